#!/bin/sh
# The database and its two roles, made once on an empty server: the owner of the tables, who
# migrates, and the application, which may do with them what `python -m app migrate` grants.
#
# The postgres image runs it from /docker-entrypoint-initdb.d. By hand, on any other server:
#
#   LIGHTBOX_SECRETS=<folder> PGHOST=... PGUSER=<superuser> PGPASSWORD=... sh app/postgres-init.sh
#
# Names and passwords are those of the two URLs in that folder, so that they stand in one place.
set -eu

secrets=${LIGHTBOX_SECRETS:-/run/secrets}

parts() { # file: prints user, password, database
	found=$(sed -nE 's#^postgresql\+psycopg://([a-z_][a-z0-9_]*):([A-Za-z0-9_-]{20,})@[^/@]+/([a-z_][a-z0-9_]*)$#\1 \2 \3#p' "$secrets/$1")
	if [ -z "$found" ]; then
		echo "$1 must be postgresql+psycopg://user:password@host/database, with a password of 20" \
			"or more letters, digits, - and _." >&2
		return 1
	fi
	echo "$found"
}

owner_parts=$(parts lightbox_migration_database_url)
app_parts=$(parts lightbox_database_url)
read -r owner owner_password database <<END
$owner_parts
END
read -r app app_password same_database <<END
$app_parts
END
if [ "$owner" = "$app" ] || [ "$database" != "$same_database" ]; then
	echo "The two URLs must name two different roles and one database." >&2
	exit 1
fi

# A statement that fails is not logged with the password in it. On standard input, so that no
# list of processes shows one either.
psql --no-psqlrc --quiet --set=ON_ERROR_STOP=1 \
	--username="${POSTGRES_USER:-${PGUSER:-postgres}}" --dbname=postgres <<END
SET log_min_error_statement = panic;
SET log_statement = 'none';
CREATE ROLE "$owner" LOGIN NOSUPERUSER NOCREATEDB NOCREATEROLE PASSWORD '$owner_password';
CREATE ROLE "$app" LOGIN NOSUPERUSER NOCREATEDB NOCREATEROLE PASSWORD '$app_password';
CREATE DATABASE "$database" OWNER "$owner" ENCODING 'UTF8' TEMPLATE template0;
REVOKE ALL ON DATABASE "$database" FROM PUBLIC;
GRANT CONNECT ON DATABASE "$database" TO "$app";
END
