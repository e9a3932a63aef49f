#!/usr/bin/env bash
# Prints the folder of wheels that pip is told of, by its configuration or its environment; nothing where there is none.
set -euo pipefail
for links in $(python3 -m pip config get global.find-links 2>/dev/null || true) ${PIP_FIND_LINKS:-}; do
  if [ -d "$links" ]; then
    echo "$links"
    exit
  fi
done
