# two-hosts.sh make|mend [RAIL]: in the guest, two RDMA devices that are as good as two hosts: `ra` (10.1.0.1) and `rb` (10.1.0.2), on the ends `ha` and `hb` of a cable. RAIL 2 to 9 is another such pair beside the first (which
# must be there): ra2 (10.2.0.1), rb2 (10.2.0.2), ha2, hb2. Everything is in one network namespace, for rxe knows no other, and what is for an address of the machine itself would stay in the machine: rules of routing send it
# over the cable.
#
# `ip link set ha down` cuts the cable; `mend` mends it, for the kernel forgets the routes of an end that is down. `tc qdisc add dev ha root netem loss 1% delay 5ms` disturbs it.
set -e
what=$1
rail=${2:-1}
n=$rail
[ "$rail" != 1 ] || n=
a=ha$n b=hb$n
to_a=10.$rail.0.1 to_b=10.$rail.0.2

mend() {
    ip -batch - <<END
link set $a up
link set $b up
route replace $to_b dev $a src $to_a table ${rail}1
route replace $to_a dev $b src $to_b table ${rail}2
END
}

make() {
    ip link add $a mtu 4500 type veth peer name $b mtu 4500
    echo 0 >/proc/sys/net/ipv4/conf/all/rp_filter
    for end in $a $b; do
        echo 0 >/proc/sys/net/ipv4/conf/$end/rp_filter
        # What comes in has an address of this machine as its source too.
        echo 1 >/proc/sys/net/ipv4/conf/$end/accept_local
    done
    # What comes out of the cable is for this machine; what is for the other end goes into it. The rule that keeps everything in the machine comes after these.
    ip -batch - <<END
addr add $to_a/32 dev $a
addr add $to_b/32 dev $b
rule add pref ${rail}1 iif $a lookup local
rule add pref ${rail}2 iif $b lookup local
rule add pref ${rail}3 to $to_b lookup ${rail}1
rule add pref ${rail}4 to $to_a lookup ${rail}2
$([ "$rail" != 1 ] || printf 'rule add pref 100 lookup local\nrule del pref 0')
END
    mend
    rdma link add ra$n type rxe netdev $a
    rdma link add rb$n type rxe netdev $b
}

case $what in
make | mend) $what ;;
*)
    echo "two-hosts.sh make|mend [RAIL]" >&2
    exit 2
    ;;
esac
