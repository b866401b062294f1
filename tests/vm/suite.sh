# suite.sh SECONDS [FOLDER PROGRAM DEVICES ARGUMENTS]...: in the guest with two hosts, what `cargo xtask test` runs there. First proofs that the machine carries data, then each test binary PROGRAM in its FOLDER, with
# KVXFER_TEST_RDMA=DEVICES and the ARGUMENTS (words in one), for SECONDS at most.
# From the environment: RDMA_DEVICES, the example rdma_devices of crates/verbs. Results are told in the words of Rust's test runner.
passed=0
failed=0
said=/tmp/suite-said

# check NAME COMMAND...: one proof; what the command said is shown if it fails.
check() {
    name=$1
    shift
    if "$@" >$said 2>&1; then
        passed=$((passed + 1))
        echo "test $name ... ok"
    else
        failed=$((failed + 1))
        echo "test $name ... FAILED"
        sed 's/^/    /' $said
    fi
}

# until_true COMMAND...: within ten seconds.
until_true() {
    tries=0
    until "$@"; do
        tries=$((tries + 1))
        [ $tries -lt 100 ] || return 1
        sleep 0.1
    done
}

# Port 18515 is where ibv_rc_pingpong listens.
listening() {
    cat /proc/net/tcp /proc/net/tcp6 | grep -q ':4853 .* 0A '
}

# pingpong SERVER_DEVICE CLIENT_DEVICE ADDRESS: 1000 messages of 4 KiB there and back, every byte looked at.
pingpong() {
    timeout 60 ibv_rc_pingpong -d "$1" -g 1 -s 4096 -m 4096 -c &
    server=$!
    until_true listening && timeout 60 ibv_rc_pingpong -d "$2" -g 1 -s 4096 -m 4096 -c "$3"
    client=$?
    [ $client = 0 ] || kill $server
    wait $server && [ $client = 0 ]
}

alone() {
    pingpong rxe0 rxe0 10.7.0.1
}

# The data goes over the cable, or two hosts are none.
over_the_cable() {
    before=$(cat /sys/class/net/ha/statistics/tx_bytes)
    pingpong ra rb 10.1.0.1 || return 1
    after=$(cat /sys/class/net/ha/statistics/tx_bytes)
    echo "over the cable: $((after - before)) bytes"
    [ $((after - before)) -ge 4096000 ]
}

# ports STATE: whether both ends are in that state.
ports() {
    [ "$(rdma link show ra/1 | grep -c "state $1 ")$(rdma link show rb/1 | grep -c "state $1 ")" = 11 ]
}

# Cut, both ends see it; mended, all goes again.
mended() {
    ip link set ha down
    until_true ports DOWN || return 1
    sh "$KVXFER_VM/two-hosts.sh" mend
    until_true ports ACTIVE && over_the_cable
}

devices() {
    "$RDMA_DEVICES" >$said.devices || return 1
    cat $said.devices
    for wanted in 'rxe0 10.7.0.1 eth0' 'ra 10.1.0.1 ha' 'rb 10.1.0.2 hb'; do
        set -- $wanted
        # The lines of this device: from its name to the next.
        sed -n "/^$1 /,/^[^ ]/{/^$1 /p;/^ /p}" $said.devices >$said.device
        grep -q '^  port 1: ACTIVE Ethernet, MTU Some(4096)' $said.device || return 1
        grep -q "^    gid 1: RoCE v2 .*$2 on $3\$" $said.device || return 1
    done
}

check "vm::devices_are_listed_with_an_active_port_and_a_routable_gid" devices
check "vm::a_device_reaches_itself" alone
check "vm::two_hosts_reach_each_other_over_the_cable" over_the_cable
check "vm::a_cut_cable_can_be_mended" mended
result=ok
[ $failed = 0 ] || result=FAILED
echo "test result: $result. $passed passed; $failed failed; 0 ignored"

seconds=$1
shift
while [ $# -ge 4 ]; do
    echo "     Running $2 on $3"
    # The arguments are words.
    (cd "$1" && KVXFER_TEST_RDMA=$3 exec timeout -k 5 "$seconds" "$2" $4)
    code=$?
    # 101: the test runner has told what failed. Nothing else has, or a binary that hangs would count for nothing.
    case $code in
    0) ;;
    101) result=FAILED ;;
    *)
        result=FAILED
        case $code in
        124 | 137) why="it ran past $seconds s" ;;
        *) why="it ended with $code" ;;
        esac
        echo "test ${2##*/} on $3 ... FAILED: $why"
        echo "test result: FAILED. 0 passed; 1 failed; 0 ignored"
        ;;
    esac
    # What a test that was ended has left: no other is to fail for it.
    sh "$KVXFER_VM/two-hosts.sh" mend
    tc qdisc del dev ha root 2>/dev/null
    shift 4
done
[ $result = ok ]
