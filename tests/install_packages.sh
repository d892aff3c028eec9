#!/usr/bin/env bash
# Installs the Debian packages that the tests need and that are missing: LaTeX for the tables, a browser for the report, and a whole Slurm with accounting, nothing
# of it as a service. Idempotent; needs root only when something is missing. SER_GRID_SKIP_SLURM=1: leave Slurm out.
set -euo pipefail
export PATH="$PATH:/usr/sbin:/sbin"

missing=()
command -v pdflatex >/dev/null || missing+=(texlive-latex-base)
command -v pdftotext >/dev/null || missing+=(poppler-utils)
command -v chromium-headless-shell >/dev/null || command -v chromium >/dev/null || missing+=(chromium-headless-shell)
command -v tmux >/dev/null || missing+=(tmux)
{ command -v kpsewhich >/dev/null && kpsewhich booktabs.sty >/dev/null; } || missing+=(texlive-latex-recommended)
{ command -v kpsewhich >/dev/null && kpsewhich siunitx.sty >/dev/null; } || missing+=(texlive-science)
if [ "${SER_GRID_SKIP_SLURM:-0}" = 0 ]; then
  while read -r program package; do
    command -v "$program" >/dev/null || missing+=("$package")
  done <<'LIST'
munged munge
slurmctld slurmctld
slurmd slurmd
sbatch slurm-client
slurmdbd slurmdbd
mariadbd mariadb-server-core
mariadb mariadb-client-core
LIST
fi
[ ${#missing[@]} -gt 0 ] || exit 0

wish="apt-get install ${missing[*]}"
if ! command -v apt-get >/dev/null; then
  echo "the tests need ${missing[*]} (Debian names), and there is no apt-get: install them, or leave Slurm out with SER_GRID_SKIP_SLURM=1" >&2
  exit 2
fi
if [ "$(id -u)" != 0 ]; then
  echo "the tests need packages: have root run '$wish', or leave Slurm out with SER_GRID_SKIP_SLURM=1" >&2
  exit 2
fi

# The packages would start their daemons: policy-rc.d forbids it for as long as they are installed, where nobody has forbidden it before.
if [ ! -e /usr/sbin/policy-rc.d ]; then
  trap 'rm -f /usr/sbin/policy-rc.d' EXIT
  printf '#!/bin/sh\nexit 101\n' >/usr/sbin/policy-rc.d
  chmod 755 /usr/sbin/policy-rc.d
fi
log=$(mktemp)
if ! { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}"; } >"$log" 2>&1; then
  tail -n 20 "$log" >&2
  echo "'$wish' failed (whole output: $log)" >&2
  exit 2
fi
rm -f "$log"
