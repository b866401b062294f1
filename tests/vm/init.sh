#!/bin/busybox sh
# The guest's first program, in its initrd. The root becomes the host's file system, which nothing here can change, under a throw-away layer in memory; /job is a folder of the host for both. What is done here is done
# from memory: each program started from the host's files takes an emulated processor a good part of a second.
b=/bin/busybox
$b mount -t devtmpfs none /dev
$b mount -t proc none /proc
$b mount -t sysfs none /sys
for module in /modules/*; do
    $b insmod "$module"
done
options=trans=virtio,version=9p2000.L,msize=512000
$b mount -t 9p -o $options,ro,cache=loose host /host
$b mount -t tmpfs none /changes
$b mkdir /changes/upper /changes/work
$b mount -t overlay -o lowerdir=/host,upperdir=/changes/upper,workdir=/changes/work none /root
$b mkdir -p /root/job /root/lib/modules /dev/shm /dev/pts
$b mount -t 9p -o $options,cache=none job /root/job
. /root/job/environment
$b mount -o bind "/root$MODULES" /root/lib/modules
$b mount -t tmpfs -o mode=1777 none /dev/shm
$b mount -t devpts none /dev/pts
$b mount -t tmpfs -o mode=755 none /root/run
$b chmod 1777 /root/tmp
for folder in dev proc sys; do
    $b mount -o move /$folder /root/$folder
done
exec $b switch_root /root /bin/sh "$KVXFER_VM/guest.sh"
