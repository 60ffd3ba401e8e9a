#!/bin/sh
# Meta-World renders off screen through OSMesa: install the system library where it is missing and that is possible.
set -u
if ldconfig -p 2>/dev/null | grep -q libOSMesa; then
    exit 0
fi
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    echo "installing libosmesa6 (the simulator renders with it)"
    apt-get update -qq && apt-get install -y -qq --no-install-recommends libosmesa6 >/dev/null && exit 0
fi
cat >&2 <<'TEXT'
The simulator needs OSMesa to render off screen, and it is not installed. Type:
    sudo apt-get install -y --no-install-recommends libosmesa6        (Debian, Ubuntu)
    sudo dnf install -y mesa-libOSMesa                                (Fedora)
then run make again.
TEXT
exit 1
