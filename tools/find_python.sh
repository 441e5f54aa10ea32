#!/bin/sh
# Print the path of a Python that MXNet 1.9.1 runs on, or say in one sentence why there is none.
# Usage: tools/find_python.sh [INTERPRETER]; without an argument the usual names are tried, newest first.
# A name in PATH proves nothing (version manager shims, Debian without python3-venv), so each candidate is run.

probe='
import sys
version = "%d.%d" % sys.version_info[:2]
if not (3, 8) <= sys.version_info[:2] <= (3, 11):
    sys.exit("is Python " + version)
try:
    import ensurepip, venv
except ImportError:
    sys.exit("is Python " + version + " without the venv module")
print(sys.executable)
'

if [ -n "$1" ]; then
    if path=$("$1" -c "$probe" 2>/dev/null); then
        echo "$path"
        exit 0
    fi
    reason=$("$1" -c "$probe" 2>&1 | tail -n 1)
    case "$reason" in is\ Python*) ;; *) reason="cannot be run" ;; esac
    echo "PYTHON=$1 $reason; MXNet 1.9.1 needs Python 3.8, 3.9, 3.10 or 3.11 with venv: pass PYTHON=/path/to/one." >&2
    exit 1
fi

tried=
for name in python3.11 python3.10 python3.9 python3.8 python3; do
    if path=$("$name" -c "$probe" 2>/dev/null); then
        echo "$path"
        exit 0
    fi
    reason=$("$name" -c "$probe" 2>&1 | tail -n 1)
    case "$reason" in is\ Python*) tried="$tried, $name $reason" ;; esac
done
echo "MXNet 1.9.1 needs Python 3.8, 3.9, 3.10 or 3.11 with venv, and none was found${tried:+ (${tried#, })}:" \
     "install one, or pass PYTHON=/path/to/one." >&2
exit 1
