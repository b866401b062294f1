# speed.sh [PAIRS]: in the guest, `kvxfer bw` beside perftest's ib_write_bw and ib_read_bw: the same device (rxe0, talking to itself), size, queue pairs and depth, in turns. Prints a line for each operation and size: the medians of both, and the median
# of the pairs' ratios. An emulated machine's speeds say nothing by themselves. Nothing here fails for being slow.
# From the environment: KVXFER_BIN, the command, built for release; QPS (1), DEPTH (64).
pairs=${1:-9}
qps=${QPS:-1}
depth=${DEPTH:-64}
bytes=$((32 << 20))
said=/tmp/speed
mkdir -p $said

# kvxfer OP SIZE: gigabytes a second.
kvxfer() {
    blocks=$(((8 << 20) / $2))
    timeout 120 "$KVXFER_BIN" bw -d rxe0 --op "$1" -s "$2" --blocks $blocks -n $((bytes / blocks / $2)) -q "$qps" -t "$depth" --threads 1 --json 2>$said/kvxfer |
        sed -n 's/.*"gb_per_s":\([0-9.]*\).*/\1/p'
}

# perftest OP SIZE: gigabytes a second. Its megabytes are 2^20 bytes.
perftest() {
    set -- "ib_$1_bw" -d rxe0 -x 1 -m 4096 -F -s "$2" -q "$qps" -t "$depth" -n $((bytes / $2 / qps))
    timeout 120 "$@" >$said/server 2>&1 &
    server=$!
    tries=0
    # It listens on port 18515.
    until grep -qi ':4853 .* 0A ' /proc/net/tcp /proc/net/tcp6; do
        tries=$((tries + 1))
        [ $tries -lt 100 ] || break
        sleep 0.1
    done
    timeout 120 "$@" 10.7.0.1 2>$said/client | awk '/^ *[0-9]+ +[0-9]+ / { printf "%.4f\n", $4 * 1048576 / 1e9 }'
    wait $server
}

# median: of the numbers on standard input.
median() {
    sort -n | awk '{ v[NR] = $1 } END { printf "%.3f", NR % 2 ? v[(NR + 1) / 2] : (v[NR / 2] + v[NR / 2 + 1]) / 2 }'
}

echo "op      size  kvxfer GB/s  perftest GB/s  of perftest  pairs  queue pairs  depth"
for size in 65536 1048576; do
    for op in write read; do
        : >$said/pairs
        for pair in $(seq "$pairs"); do
            # Who comes first changes.
            if [ $((pair % 2)) = 1 ]; then
                ours=$(kvxfer $op $size)
                theirs=$(perftest $op $size)
            else
                theirs=$(perftest $op $size)
                ours=$(kvxfer $op $size)
            fi
            if [ -z "$ours" ] || [ -z "$theirs" ]; then
                echo "$op $size: a run gave no figure"
                cat $said/kvxfer $said/server $said/client
                exit 1
            fi
            echo "$ours $theirs" >>$said/pairs
        done
        printf '%-5s %7d  %11s  %13s  %11s  %5d  %11d  %5d\n' $op $size \
            "$(cut -d' ' -f1 $said/pairs | median)" "$(cut -d' ' -f2 $said/pairs | median)" \
            "$(awk '{ print $1 / $2 }' $said/pairs | median)" "$pairs" "$qps" "$depth"
    done
done
