#!/bin/sh
# Install the S3-compatible server that the tests marked `s3` start by themselves: the Ceph Object
# Gateway with one monitor and one store daemon (Debian and Ubuntu packages, LGPL-2.1, about 70 MB).
# Nothing is configured or started here. Needs root.
set -eu
apt-get update
DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
    radosgw ceph-mon ceph-osd ceph-common curl faketime
