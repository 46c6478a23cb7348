#!/usr/bin/env bash
# Install SLURM, munge, accounting and the tools of the tests on Debian or Ubuntu, as root.
# Nothing is started: tests/slurm/cluster.py does that, in a folder of its own.
set -eu
packages=(munge slurmctld slurmd slurm-client slurmdbd mariadb-server-core mariadb-client-core
  iproute2 util-linux)
if dpkg -s "${packages[@]}" >/dev/null 2>&1; then
  echo "already installed: ${packages[*]}"
  exit 0
fi
# Packages must not start services of their own while they are installed.
policy=/usr/sbin/policy-rc.d
if [ ! -e "$policy" ]; then
  printf '#!/bin/sh\nexit 101\n' >"$policy"
  chmod +x "$policy"
  trap 'rm -f "$policy"' EXIT
fi
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq
apt-get install -y -qq --no-install-recommends "${packages[@]}"
