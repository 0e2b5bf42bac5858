#!/usr/bin/env bash
# Tells Ray when AWS is about to take this spot machine back, so that the run on it saves first.
#
# cluster.yaml starts it on every worker; it ends with Ray. AWS gives two minutes' notice in the instance's metadata
# (404 until then); `ray drain-node` passes it on, with the time that is left, to whoever trains here.
set -u
metadata=${EC2_METADATA_URL:-http://169.254.169.254}/latest
while sleep "${SPOT_POLL_S:-5}"; do
  pgrep -x raylet > /dev/null || exit 0
  token=$(curl -sf -m 2 -X PUT -H 'X-aws-ec2-metadata-token-ttl-seconds: 60' "$metadata/api/token") || continue
  notice=$(curl -sf -m 2 -H "X-aws-ec2-metadata-token: $token" "$metadata/meta-data/spot/instance-action") || continue
  at=$(printf '%s' "$notice" | sed -n 's/.*"time": *"\([^"]*\)".*/\1/p')
  left=$(($(date -d "$at" +%s) - $(date +%s) - 5))
  echo "$(date -u +%FT%TZ) $notice"
  ray drain-node --address "$RAY_HEAD_IP:6379" --reason DRAIN_NODE_REASON_PREEMPTION \
    --reason-message "AWS takes this spot machine back at $at" \
    --deadline-remaining-seconds $((left > 0 ? left : 0)) && exit 0
done
