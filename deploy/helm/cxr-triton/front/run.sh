#!/bin/sh
# Runs nginx, has it take new certificates and settings without a restart, and lets calls under way end at SIGTERM.
# run.sh STATE FOLDER SETTLE_S [EVERY_S]
set -eu
state=$1 folder=$2 settle=$3 every=${4:-10}

seen() { find -L "$folder" -type f -exec sha256sum {} + | sort | sha256sum; }

nginx -p "$state/" -c "$folder/nginx.conf" -e stderr -g 'daemon off;' &
nginx=$!
trap 'sleep "$settle"; kill -QUIT "$nginx"; wait "$nginx"; exit $?' TERM INT QUIT

before=$(seen)
while kill -0 "$nginx" 2> /dev/null; do
    sleep "$every" &
    wait $!
    now=$(seen)
    if [ "$now" != "$before" ] && nginx -q -t -p "$state/" -c "$folder/nginx.conf" -e stderr; then
        kill -HUP "$nginx"
        before=$now
    fi
done
wait "$nginx"
