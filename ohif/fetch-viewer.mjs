// Downloads the viewer's package with npm's client and checks it against version.json, as
// app/demo/ohif.py does for the demo. Writes viewer.tgz into the current folder.
import { execFileSync } from 'node:child_process';
import { createHash } from 'node:crypto';
import { readFileSync, renameSync } from 'node:fs';

const pinned = JSON.parse(readFileSync('version.json', 'utf8'));
const name = execFileSync(
  'npm',
  ['pack', `${pinned.package}@${pinned.version}`, '--ignore-scripts', '--silent'],
  { encoding: 'utf8' },
).trim();
const found = 'sha512-' + createHash('sha512').update(readFileSync(name)).digest('base64');
if (found !== pinned.integrity) {
  console.error(`${name} is not the package pinned in ohif/version.json.`);
  process.exit(1);
}
renameSync(name, 'viewer.tgz');
