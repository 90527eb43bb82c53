#!/bin/sh
# Installs what Lightbox needs on this machine: Debian or Ubuntu, as root or with sudo.
#
#   sh app/demo/bootstrap.sh run     for the demo
#   sh app/demo/bootstrap.sh test    for the demo and all tests
#
# What is there already is left as it is; with everything in place this takes no time. Services
# that are installed here (orthanc, nginx, postgresql) are neither started nor enabled: Lightbox
# starts its own. The full output of every step is in .lightbox/setup.log.
set -eu

mode=${1:-run}
case $mode in
run) lock=app/requirements.txt ;;
test) lock=tests/requirements.txt ;;
*)
	echo "usage: sh app/demo/bootstrap.sh run|test" >&2
	exit 2
	;;
esac

cd "$(dirname "$0")/../.."
umask 022
mkdir -p -m 700 .lightbox
log=.lightbox/setup.log
[ -n "${HOME:-}" ] || export HOME="$PWD/.lightbox"
PATH=$PATH:/usr/local/sbin:/usr/sbin:/sbin
LC_ALL=C.UTF-8
export PATH LC_ALL

# ------------------------------------------------------------------------------ showing

fail() { # sentence...
	printf '\n%s\n' "$*" >&2
	exit 1
}

# Run a command, its output to the log, a dot every two seconds; on failure say why and stop.
step() { # what, command...
	what=$1
	shift
	number=$((number + 1))
	printf '[%s/%s] %s ' "$number" "$steps" "$what"
	printf '\n== %s\n' "$what" >>"$log"
	first_line=$(wc -l <"$log")
	began=$(date +%s)
	"$@" </dev/null >>"$log" 2>&1 &
	child=$!
	ticks=0
	while kill -0 "$child" 2>/dev/null; do
		sleep 0.2
		ticks=$((ticks + 1))
		[ $((ticks % 10)) -ne 0 ] || printf .
	done
	code=0
	wait "$child" || code=$?
	child=
	if [ "$code" -eq 0 ]; then
		printf ' done (%s s)\n' $(($(date +%s) - began))
		return
	fi
	printf ' failed\n\n' >&2
	tail -n "+$((first_line + 1))" "$log" >"$log.step"
	tail -n 8 "$log.step" | cut -c 1-160 | sed 's/^/    /' >&2
	reason=$(explain "$log.step")
	rm -f "$log.step"
	fail "$reason (Everything that was printed: $log)"
}

explain() { # file
	if grep -Eqi 'temporary failure (in name )?resol|could not resolve|name or service not known|network is unreachable|no route to host|could not connect|connection (timed out|refused)|newconnectionerror|nameresolutionerror' "$1"; then
		echo "The package servers can't be reached: connect this machine to the network (behind a proxy, set http_proxy and https_proxy) and run it again."
	elif grep -q 'Could not get lock' "$1"; then
		echo "Another program is installing packages: wait until it is done and run it again."
	elif grep -qi 'no space left on device' "$1"; then
		echo "The disk is full: make room and run it again."
	elif grep -q 'DO NOT MATCH THE HASHES' "$1"; then
		echo "A downloaded Python package is not the one that $lock pins: nothing of it was installed. Find out what changed it on its way here before you try again."
	elif grep -Eq 'Unable to locate package|has no installation candidate' "$1"; then
		echo "This release of the distribution lacks a package: install it by hand, or use Debian 12 or newer or Ubuntu 24.04 or newer."
	elif grep -qi 'certificate verify failed\|certificate verification failed' "$1"; then
		echo "The package servers' certificates aren't trusted here: check the clock, and, behind an inspecting proxy, add its certificate to this machine's."
	else
		echo "That step failed; the lines above say why."
	fi
}

child=
policy=
# shellcheck disable=SC2329  # called by trap
clean_up() {
	trap '' INT TERM HUP
	if [ -n "$child" ] && [ -n "$policy" ]; then
		# Half-installed packages would be worse than a wait.
		printf ' stopping when the packages are in place ...\n'
		wait "$child" || :
	elif [ -n "$child" ]; then
		kill "$child" 2>/dev/null || :
	fi
	[ -z "$policy" ] || as_root rm -f "$policy" || :
}
trap clean_up EXIT
trap 'exit 130' INT
trap 'exit 143' TERM HUP

# ------------------------------------------------------------------------------ finding

has() {
	command -v "$1" >/dev/null 2>&1
}

exists() { # files, as a pattern that may match none
	for file in "$@"; do
		[ -e "$file" ] && return 0
	done
	return 1
}

suits() { # python: new enough, and able to make an environment
	"$1" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1
}

ready() { # .venv, whole
	.venv/bin/python -c 'import importlib.util as find, sys
sys.exit(sys.version_info < (3, 11) or find.find_spec("pip") is None)' >/dev/null 2>&1
}

# The first python3 on PATH that suits, else one with its version in its name.
find_python() {
	remaining=$PATH:
	while [ -n "$remaining" ]; do
		folder=${remaining%%:*}
		remaining=${remaining#*:}
		[ -x "$folder/python3" ] && suits "$folder/python3" && echo "$folder/python3" && return
	done
	for version in 11 12 13 14; do
		has "python3.$version" && suits "python3.$version" && echo "python3.$version" && return
	done
	return 1
}

has_plugin() {
	exists /usr/share/orthanc/plugins*/libOrthancDicomWeb.so* \
		/usr/local/share/orthanc/plugins/libOrthancDicomWeb.so* \
		/usr/lib/orthanc/plugins/libOrthancDicomWeb.so*
}

missing_packages() {
	ready || find_python >/dev/null || echo python3 python3-venv
	exists /etc/ssl/certs/ca-certificates.crt || has update-ca-trust || echo ca-certificates
	has Orthanc || echo orthanc
	has_plugin || echo orthanc-dicomweb
	has nginx || echo nginx
	has npm || echo npm
	if [ "$mode" = test ]; then
		has initdb || exists /usr/lib/postgresql/1[5-9]/bin/initdb || echo postgresql
		has chromium || echo chromium
		# The browser tests' driver brings a Node.js of its own, which needs it.
		exists /usr/lib/*/libatomic.so.1 /usr/lib64/libatomic.so.1 || echo libatomic1
		has storescu || echo dcmtk
		has dciodvfy || echo dicom3tools
		has wrk || echo wrk
	fi
}

# ------------------------------------------------------------------------------ installing

as_root() {
	if [ "$(id -u)" -eq 0 ]; then "$@"; else sudo "$@"; fi
}

install_packages() { # packages...
	as_root apt-get -q update -o Acquire::Retries=2
	as_root env DEBIAN_FRONTEND=noninteractive NEEDRESTART_SUSPEND=1 apt-get -q install -y \
		--no-install-recommends -o Acquire::Retries=2 -o DPkg::Lock::Timeout=120 \
		-o Dpkg::Use-Pty=0 -o Dpkg::Options::=--force-confold "$@"
	# Their packages enable them; what was installed before is not touched.
	for service in orthanc nginx postgresql; do
		case " $* " in
		*" $service "*) as_root update-rc.d "$service" disable || : ;;
		esac
	done
}

# While packages are installed, tell them not to start their services (invoke-rc.d(8)).
hold_services() {
	[ -e /usr/sbin/policy-rc.d ] && return
	held=.lightbox/policy-rc.d
	cat >"$held" <<-'END'
		#!/bin/sh
		case $1 in orthanc* | nginx* | postgresql*) exit 101 ;; esac
		exit 0
	END
	policy=/usr/sbin/policy-rc.d
	as_root install -m 755 "$held" "$policy"
	rm -f "$held"
}

debian_packages() {
	has apt-get || fail "This machine has no apt-get. Install by hand what is missing here" \
		"($missing): Python 3.11 or newer with venv, Orthanc with its DICOMweb plugin, nginx, npm," \
		"and for the tests PostgreSQL 15 or newer, Chromium, DCMTK, dicom3tools and wrk. Then run it" \
		"again."
	if [ "$(id -u)" -ne 0 ]; then
		has sudo || fail "Packages are missing ($missing), and this user may not install them:" \
			"run it as root, or ask someone to run: apt-get install $missing"
		# The only question that may be asked: sudo's, at a terminal.
		if [ -t 0 ]; then sudo -v; else sudo -n true 2>>"$log"; fi ||
			fail "Packages are missing ($missing), and sudo refuses: run it as root, or ask" \
				"someone to run: apt-get install $missing"
	fi
	hold_services
	# shellcheck disable=SC2086  # a list of words
	step "Debian packages: $(echo $missing | sed 's/ /, /g')" install_packages $missing
	if [ -n "$policy" ]; then
		as_root rm -f "$policy"
		policy=
	fi
}

python_environment() {
	python=$(find_python) || fail "Lightbox needs Python 3.11 or newer with its venv module;" \
		"this release of the distribution has none. Install one and run it again."
	step "Python environment: .venv, with $python" "$python" -m venv --clear .venv
}

python_packages() {
	step "Python packages, as pinned in $lock" \
		.venv/bin/python -m pip install --require-hashes --only-binary :all: --no-input \
		--disable-pip-version-check --retries 2 -r "$lock"
	for pinned in app/requirements.txt "$lock"; do # the tests' lock holds the app's
		fingerprint "$pinned" >"$(stamp "$pinned")"
	done
}

fingerprint() { # lock
	sha256sum <"$1"
}

stamp() { # lock
	echo ".venv/.$(dirname "$1")-requirements"
}

up_to_date() {
	[ -e "$(stamp "$lock")" ] && [ "$(cat "$(stamp "$lock")")" = "$(fingerprint "$lock")" ]
}

# ------------------------------------------------------------------------------ what is to do

missing=$(missing_packages | tr '\n' ' ' | sed 's/ $//')
steps=0
number=0
[ -z "$missing" ] || steps=$((steps + 1))
if ! ready; then
	steps=$((steps + 2))
elif ! up_to_date; then
	steps=$((steps + 1))
fi

[ "$steps" -eq 0 ] || : >"$log"
[ -z "$missing" ] || debian_packages
ready || python_environment
up_to_date || python_packages
