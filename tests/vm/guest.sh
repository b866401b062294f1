# The guest's process 1 after init.sh: makes the devices, runs /job/command, hands back its exit code and ends the machine. What goes wrong before that is on the console, and then there is no exit code.
# From the environment: KVXFER_VM (this folder), TWO_HOSTS (1 or nothing).
set -e
echo guest >/proc/sys/kernel/hostname
ulimit -l unlimited
ulimit -c 0
ulimit -n 65536
# An address is there at once, or the table of GIDs would change under a program that has just begun.
for which in all default; do
    echo 0 >/proc/sys/net/ipv6/conf/$which/accept_dad
done
# 4096 bytes and their headers: the largest MTU of RDMA.
ip -batch - <<END
link set lo up
link add eth0 mtu 4500 type veth peer name eth0p mtu 4500
addr add 10.7.0.1/24 dev eth0
link set eth0p up
link set eth0 up
END
rdma link add rxe0 type rxe netdev eth0
if [ "$TWO_HOSTS" ]; then
    sh "$KVXFER_VM/two-hosts.sh" make
fi
tries=0
for device in /sys/class/infiniband/*; do
    until read -r state <"$device/ports/1/state" && [ "$state" = '4: ACTIVE' ]; do
        tries=$((tries + 1))
        [ $tries -lt 100 ]
        sleep 0.1
    done
done

set +e
unset MODULES TWO_HOSTS
: >/job/up
sh /job/command </dev/null >>/job/stdout 2>>/job/stderr
echo $? >/job/code.new
mv /job/code.new /job/code
echo b >/proc/sysrq-trigger
sleep 60
