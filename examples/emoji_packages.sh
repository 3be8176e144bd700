#!/bin/sh
# Fetches the icon sets that the emoji world is rendered from into the folder $1. They are needed to train it again.
#   sh examples/emoji_packages.sh packages
#   python -m erasec.emoji.data packages --out data
#   python -m erasec.worlds.train emoji --data data --work work
set -eu
mkdir -p "${1:?usage: $0 FOLDER}"
cd "$1"
for package in noto@1.2.9 twemoji@1.2.5 fluent-emoji-flat@1.2.6 noto-v1@1.2.5; do
  name=${package%@*}
  archive=$(npm pack --silent "@iconify-json/$package")
  rm -rf "$name"
  mkdir "$name"
  tar -xzf "$archive" -C "$name" --strip-components=1
  rm "$archive"
done
