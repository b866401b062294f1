#!/bin/sh
# Measures and tests GPU memory. Needs the GPU's driver and glibc 2.34, neither Rust nor network.
#
#   run.sh [FOLDER]       results go there; `results` beside this file if none is named
#
# KVXFER_TEST_GPU names the runtime: cuda, hip, or auto (the default). Ends within eight minutes, with 0 if
# all tests passed and everything could be measured.
set -u
here=$(cd "$(dirname "$0")" && pwd)
out=${1:-$here/results}
mkdir -p "$out" || exit 2
KVXFER_TEST_GPU=${KVXFER_TEST_GPU:-auto}
export KVXFER_TEST_GPU
began=$(date +%s)
last=470
left() { echo $((last - $(date +%s) + began)); }

{
    echo "bundle: $(cat "$here/COMMIT")"
    echo "date: $(date -u +%Y-%m-%dT%H:%MZ)"
    echo "system: $(uname -srm), $(getconf GNU_LIBC_VERSION 2>/dev/null)"
    if command -v nvidia-smi >/dev/null; then
        nvidia-smi --query-gpu=index,name,pci.bus_id,driver_version,memory.total,clocks.max.sm --format=csv
        nvidia-smi topo -m 2>/dev/null
    fi
    if command -v rocm-smi >/dev/null; then
        rocm-smi --showproductname --showdriverversion --showtopo 2>/dev/null
    fi
} 2>&1 | tee "$out/machine.txt"

echo
echo "== speed =="
timeout -k 5 110 "$here/gpu_table" "$out/table.jsonl" >"$out/table.txt" 2>&1
table=$?
cat "$out/table.txt"
[ $table -ne 0 ] && echo "gpu_table ended with $table"
timeout -k 5 60 "$here/gpu_post" "$out/post.jsonl" >"$out/post.txt" 2>&1
post=$?
cat "$out/post.txt"
[ $post -ne 0 ] && echo "gpu_post ended with $post"

echo
echo "== the command =="
command() { env -u KVXFER_TEST_GPU KVXFER_GPU="$KVXFER_TEST_GPU" "$@"; }
command "$here/kvxfer" devices 2>&1 | tee "$out/devices.txt"
# From process to process, each with a GPU of its own where there are two; every byte is verified once.
command timeout -k 5 200 "$here/kvxfer" bw --mem gpu --size 4K,16K,64K,4M,16M --json >"$out/bw.json" 2>"$out/bw.txt"
bw=$?
cat "$out/bw.txt"
# Through pinned memory: to this host's memory and back, and between GPUs as if they were on two hosts. The limit is
# what goes beneath.
over() {
    file=$1 path=$2
    shift 2
    KVXFER_PATH=$path command timeout -k 5 40 "$here/kvxfer" bw "$@" -D 500ms --size 16K,1M --json \
        >"$out/$file.json" 2>"$out/$file.txt"
    ended=$?
    cat "$out/$file.txt"
    [ $ended -ne 0 ] && echo "kvxfer bw, $path, ended with $ended" && bw=$ended
}
over bw-to-host staged,arena --mem gpu --peer-mem host
over bw-from-host staged,arena --mem host --peer-mem gpu
over bw-tcp staged,tcp --mem gpu
# Between this host's memory and a GPU by one launch, for the side that has the destination. The limit is one pinned
# copy by the copy engine.
over ipc-gpu ipc --mem gpu --peer-mem host
over ipc-host ipc --mem host --peer-mem gpu
rows() {
    sed 's/"op":"/\n/g' "$out/$1.json" | sed -n "s/^$2\",[^{[]*\"path\":\"\([a-z-]*\)\".*\"block_bytes\":\([0-9]*\).*\"gb_per_s\":\([0-9.]*\),\"limit_gb_per_s\":\([0-9.]*\),\"of_limit\":\([0-9.]*\).*/$3 over \1, $2, \2 bytes a block: \3 GB\/s of \4, \5/p"
}
rows ipc-gpu read 'host memory to a GPU'
rows ipc-host write 'host memory to a GPU'
rows ipc-gpu write 'a GPU to host memory'
rows ipc-host read 'a GPU to host memory'
cat "$out"/bw*.json | sed 's/"op":"/\n/g' | sed -n 's/^\([a-z]*\)",[^{[]*"path":"\([a-z-]*\)".*"block_bytes":\([0-9]*\).*"gb_per_s":\([0-9.]*\),"limit_gb_per_s":\([0-9.]*\),"of_limit":\([0-9.]*\).*/\1 over \2, \3 bytes a block: \4 GB\/s of \5, \6/p'
[ $bw -ne 0 ] && echo "kvxfer bw ended with $bw"
# The same blocks, each posted by a kernel.
command timeout -k 5 60 "$here/kvxfer" bw --mem gpu --initiator gpu --size 4K,16K --blocks 256 --iters 5 --json >"$out/bw-kernel.json" 2>"$out/bw-kernel.txt"
by_kernel=$?
cat "$out/bw-kernel.txt"
sed 's/"op":"/\n/g' "$out/bw-kernel.json" | sed -n 's/^\([a-z]*\)".*"executor":"\([a-z-]*\)".*"hca":"\([a-z]*\)","path":"\([a-z-]*\)".*"block_bytes":\([0-9]*\).*"gb_per_s":\([0-9.]*\),"limit_gb_per_s":\([0-9.]*\),.*"blocks_per_s":\([0-9.]*\).*/\1 posted by a kernel (\2, NIC: \3) over \4, \5 bytes a block: \6 GB\/s of \7, \8 posts\/s/p'
[ $by_kernel -ne 0 ] && echo "kvxfer bw --initiator gpu ended with $by_kernel"
# And copied by a kernel into the other side's memory.
command timeout -k 5 60 "$here/kvxfer" bw --mem gpu --initiator gpu --queue links --size 4K,16K --blocks 65536 --iters 10 --json >"$out/bw-links.json" 2>"$out/bw-links.txt"
by_links=$?
cat "$out/bw-links.txt"
sed 's/"op":"/\n/g' "$out/bw-links.json" | sed -n 's/^write.*"executor":"\([a-z-]*\)".*"hca":"\([a-z]*\)","path":"\([a-z-]*\)".*"block_bytes":\([0-9]*\).*"gb_per_s":\([0-9.]*\),"limit_gb_per_s":\([0-9.]*\),"of_limit":\([0-9.]*\).*"blocks_per_s":\([0-9.]*\).*/copied by a kernel (\1, NIC: \2) over \3, \4 bytes a block: \5 GB\/s of \6, \7; \8 puts\/s/p'
[ $by_links -ne 0 ] && echo "kvxfer bw --queue links ended with $by_links" && by_kernel=$by_links
for queue in proxy gpu-wqe direct; do
    timeout -k 5 60 "$here/gpu_push" --gpu "$KVXFER_TEST_GPU" --queue $queue 2>&1 || echo "gpu_push --queue $queue failed"
done | tee "$out/gpu_push.txt"
# Posts a second that are carried out: 64-byte puts of four pushes with a worker each, and blocks over GPU links.
{
    timeout -k 5 30 "$here/post_rate" --gpu "$KVXFER_TEST_GPU" --queues 4 --posters 64 || echo "post_rate failed"
    for blocks in 1024 16384; do
        timeout -k 5 30 "$here/post_rate" --gpu "$KVXFER_TEST_GPU" --memory gpu --block-bytes 16384 --layers 1 --blocks $blocks --posters 64 || echo "post_rate failed"
    done
} 2>&1 | tee "$out/post_rate.txt"
# What a pipe ends with is tee's end.
grep -qE '^(gpu_push|post_rate).* failed$' "$out/gpu_push.txt" "$out/post_rate.txt" && by_kernel=1

echo
echo "== tests =="
: >"$out/tests.jsonl"
passed=0
failed=
for of in gpu-tests engine-tests staged-tests queue-tests; do
for name in $("$here/$of" --list --format terse 2>/dev/null | sed -n '/on_rdma_/d; s/: test$//p'); do
    if [ "$(left)" -le 0 ]; then
        echo "not run, the time is over: $name"
        failed="$failed $name"
        printf '{"test":"%s","result":"not run"}\n' "$name" >>"$out/tests.jsonl"
        continue
    fi
    # Each by itself: one that loses the GPU, or the process, leaves the others.
    limit=40
    [ "$(left)" -lt $limit ] && limit=$(left)
    start=$(date +%s%N)
    timeout -k 2 "$limit" "$here/$of" --exact "$name" --include-ignored --nocapture --test-threads=1 \
        >"$out/last.txt" 2>&1
    code=$?
    ms=$((($(date +%s%N) - start) / 1000000))
    if [ $code -eq 0 ] && grep -q '^test result: ok. 1 passed' "$out/last.txt"; then
        passed=$((passed + 1))
        result=passed
        echo "ok      $name  ($ms ms)"
        grep -E '^(near|far|round|one GPU|registers)' "$out/last.txt" | sed 's/^/          /'
    else
        failed="$failed $name"
        result=failed
        echo "FAILED  $name  ($ms ms, ended with $code)"
        sed 's/^/        | /' "$out/last.txt" | tail -n 40
    fi
    printf '{"test":"%s","result":"%s","ms":%s}\n' "$name" "$result" "$ms" >>"$out/tests.jsonl"
done
done
rm -f "$out/last.txt"
echo
echo "$passed tests passed"
for name in $failed; do
    echo "FAILED OR NOT RUN: $name"
done
echo "$(($(date +%s) - began)) seconds; results in $out"
[ -z "$failed" ] && [ $passed -gt 0 ] && [ $table -eq 0 ] && [ $post -eq 0 ] && [ $bw -eq 0 ] && [ $by_kernel -eq 0 ] || exit 1
