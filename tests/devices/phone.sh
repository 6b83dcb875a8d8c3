#!/bin/bash
# A phone for tests: the real adbd in an arm64 root of Debian 13, run by qemu-user 10. It is Linux, not Android.
#
#   phone.sh make DIR         unpack it into DIR: packages of the machine's own Debian mirror, nothing is installed
#   phone.sh run DIR PORT     adbd on a TCP port, in namespaces of its own; QEMU_CPU picks the processor
#   phone.sh sshd DIR CONFIG  the real sshd instead, by a configuration in the root, once a line comes on standard input:
#                             until then the caller, who must be root, maps the users that sshd changes to
#
# Needs apt, unprivileged user namespaces, and a kernel that has binfmt_misc in them (Linux 6.7).
set -euo pipefail
PATH=$PATH:/usr/sbin:/sbin # chroot

# unpack ARCH ROOT PACKAGE…: the packages and what they depend on, with a private apt state; no maintainer script runs
unpack() {
    local arch=$1 root=$2 state=$2.apt
    shift 2
    mkdir -p "$state"/{lists/partial,cache/archives/partial,parts} "$root"
    : >"$state/status"
    # the machine's own main stanza, for another suite
    awk -v RS= '/Suites: [a-z]+( |$|\n)/ && !/security/' /etc/apt/sources.list.d/debian.sources |
        sed 's/^Suites:.*/Suites: trixie/' >"$state/parts/main.sources"
    cat >"$state/apt.conf" <<END
Dir::State::lists "$state/lists"; Dir::State::status "$state/status"; Dir::Cache "$state/cache";
Dir::Etc::sourcelist "/dev/null"; Dir::Etc::sourceparts "$state/parts";
APT::Architecture "$arch"; APT::Architectures "$arch"; APT::Install-Recommends "false"; Acquire::Languages "none";
END
    APT_CONFIG=$state/apt.conf apt-get -q update >/dev/null
    APT_CONFIG=$state/apt.conf apt-get -y -qq -d install "$@" >/dev/null
    for name in bin sbin lib lib64; do
        mkdir -p "$root/usr/$name"
        ln -sfn "usr/$name" "$root/$name"
    done
    for deb in "$state"/cache/archives/*.deb; do
        dpkg-deb --fsys-tarfile "$deb" | tar -x -C "$root" --keep-directory-symlink
    done
    rm -rf "$state"
}

make() {
    local root=$1/root
    # Debian 12's qemu 7.2 crashes on recent versions of ONNX Runtime.
    unpack amd64 "$1/qemu" qemu-user
    unpack amd64 "$1/headers" libonnxruntime-dev
    unpack arm64 "$root" adbd busybox-static openssh-server
    mkdir -p "$root"/{dev,proc,sys,tmp,root,etc,run/sshd,mnt/full,mnt/readonly,data/local/tmp,data/misc/adb,system}
    chmod 1777 "$root/tmp" "$root/data/local/tmp"
    printf '%s\n' root:x:0:0:root:/root:/bin/sh sshd:x:100:65534::/run/sshd:/bin/false >"$root/etc/passwd"
    printf '%s\n' root:x:0: nogroup:x:65534: >"$root/etc/group"
    for tool in sh cat cp mv rm ln mkdir uname chmod kill sleep sha256sum stat df find readlink tar gzip; do
        ln -sf busybox "$root/usr/bin/$tool"
    done
    touch "$1/ready"
}

# What both do in a namespace of mounts: programs of its processor start by qemu, and the root has its file systems.
export ENTER='
    set -e
    mount -t binfmt_misc binfmt_misc /proc/sys/fs/binfmt_misc
    head="\x7fELF\x02\x01\x01\x00\x00\x00\x00\x00\x00\x00\x00\x00\x02\x00\xb7\x00"
    mask="\xff\xff\xff\xff\xff\xff\xff\x00\xff\xff\xff\xff\xff\xff\xff\xff\xfe\xff\xff\xff"
    # name:type:offset:magic:mask:interpreter:flags; the kernel decodes the escapes
    printf "%s" ":qemu-aarch64:M::$head:$mask:$PHONE/qemu/usr/bin/qemu-aarch64:FP" >/proc/sys/fs/binfmt_misc/register
    for name in proc dev sys; do mount --rbind "/$name" "$PHONE/root/$name"; done
    mount -t tmpfs -o size=4m tmpfs "$PHONE/root/mnt/full"
    mount -t tmpfs -o ro tmpfs "$PHONE/root/mnt/readonly"'

run() {
    export PHONE=$1 ADBD_PORT=$2 QEMU_CPU=${QEMU_CPU:-cortex-a76}
    exec unshare --user --map-root-user --mount bash -c "$ENTER"'
        exec chroot "$PHONE/root" /usr/sbin/adbd'
}

sshd() {
    export PHONE=$1 CONFIG=$2 QEMU_CPU=${QEMU_CPU:-cortex-a76}
    exec unshare --user --mount bash -c 'read -r line
        '"$ENTER"'
        exec chroot "$PHONE/root" /usr/sbin/sshd -D -e -f "$CONFIG"'
}

directory=$(realpath -m "$2")
case $1 in
make) make "$directory" ;;
run) run "$directory" "$3" ;;
sshd) sshd "$directory" "$3" ;;
esac
