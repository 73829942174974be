#!/bin/bash
# serve-vllm.sh DIR PORT EVENTS_PORT [vllm arguments…]: one real vLLM of install.sh's DIR, in the foreground (exec).
# KV events are published on EVENTS_PORT and replayed on EVENTS_PORT+1; GET /kv_event_sources tells both.
# Wait for GET /health: about 60 CPU-seconds to start; 3.5 to 4 GB resident. float32 is the fast path without AVX-512;
# KV_CACHE_MIB (1024) is most of what can be saved of it. One thread and passive waiting keep two engines from spinning against each other on two cores.
set -eu
dir=$1 port=$2 events=$3; shift 3
export HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1 DO_NOT_TRACK=1 VLLM_SERVER_DEV_MODE=1
export VLLM_CPU_OMP_THREADS_BIND=nobind
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} OMP_WAIT_POLICY=PASSIVE
exec "$dir/venv/bin/vllm" serve "$dir/model" --host 127.0.0.1 --port "$port" \
  --kv-cache-memory-bytes $((${KV_CACHE_MIB:-1024} << 20)) \
  --dtype float32 --max-model-len 2048 --block-size 32 --enforce-eager --enable-scale-out --enable-prompt-tokens-details \
  --enable-auto-tool-choice --tool-call-parser hermes \
  --kv-events-config "{\"enable_kv_cache_events\":true,\"publisher\":\"zmq\",\"endpoint\":\"tcp://*:$events\",\"replay_endpoint\":\"tcp://*:$((events+1))\",\"topic\":\"kv-events\"}" \
  "$@"
