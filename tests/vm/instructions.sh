# instructions.sh [OP]: in the guest, how many instructions the command takes for a posted work request, from a plan of blocks to the driver, by callgrind
# (Debian: valgrind). One queue pair, blocks of 4 KiB, OP is write (as it is when not given) or read; the difference between 2 and 10 transfers of 1024 blocks is told, so that what is done once is left out.
# From the environment: KVXFER_BIN, the command, built for release with line tables.
op=${1:-write}
said=/tmp/instructions
mkdir -p $said
command -v valgrind >/dev/null || {
    echo "there is no valgrind: install it"
    exit 1
}
# An emulated machine with an emulated processor in it takes its time.
export KVXFER_CONNECT_TIMEOUT=120 KVXFER_HEARTBEAT_TIMEOUT=300

# profile TRANSFERS: what callgrind counts.
profile() {
    "$KVXFER_BIN" serve -d rxe0 --listen 127.0.0.1:7400 --threads 1 >$said/serve 2>&1 &
    server=$!
    tries=0
    until grep -q listening $said/serve; do
        tries=$((tries + 1))
        [ $tries -lt 200 ] || break
        sleep 0.1
    done
    timeout 300 valgrind --tool=callgrind --callgrind-out-file=$said/"$1" "$KVXFER_BIN" bw 127.0.0.1:7400 -d rxe0 --op "$op" -s 4K --blocks 1024 -n "$1" \
        --threads 1 -q 1 --timeout 300 --json >$said/bw 2>&1 || {
        cat $said/bw
        exit 1
    }
    kill $server
    wait $server
}

# counts TRANSFERS: by step. What is inlined counts where it was inlined.
counts() {
    callgrind_annotate --auto=no --show-percs=no --threshold=100 $said/"$1" 2>$said/annotate |
        awk '/^ *[0-9][0-9,]* +[^ ]+:/ {
            n = $1
            gsub(",", "", n)
            step = ""
            if (/librxe/) step = "driver"
            else if (/Emitter|plan::lazy::Plan as/) step = "operations"
            else if (/Scheduler::next_/) step = "scheduler"
            else if (/worker::posting::|worker::Worker::work/) step = "chain"
            else if (/RdmaQp as .*::post_send|ring::Ring::(push|hold)/) step = "posting"
            if (step != "") sum[step] += n
        }
        END { for (step in sum) print step, sum[step] }' | sort
}

profile 2
profile 10
counts 2 >$said/few
counts 10 >$said/many
echo "$op: instructions a work request (chain: with the loop of the worker, and what it does for completions)"
join $said/few $said/many | awk '{
    each = ($3 - $2) / 8192
    printf "%-10s  %6.1f\n", $1, each
    if ($1 != "driver") ours += each
}
END { printf "%-10s  %6.1f\n", "ours", ours; exit ours <= 0 }'
