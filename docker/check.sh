#!/usr/bin/env bash
# Builds the Dockerfile, line by line as it stands, where there is neither Docker nor NVIDIA's image, and runs what it
# made: buildah executes every step in a clean root that debootstrap made of a distribution's packages. TensorRT-RTX, which
# builds engines without a GPU, stands in for the TensorRT of NVIDIA's image. Not checked: that image itself, and a GPU.
#
#   docker/check.sh [SUITE]    as root, with debootstrap and buildah installed (both are packages of Debian and Ubuntu)
#
#   SUITE    noble (the default: Python 3.12, as 25.10-py3), jammy (3.10, as 23.12-py3), bookworm (3.11), …
#   MIRROR   where its packages come from (the distribution's own)
#   EXTRAS   of pyproject.toml (torch,rtx); "rtx" leaves PyTorch out, and with it compute_score
#   WHEELS   a folder of wheels that pip takes from first: put a CPU build of torch there, the usual one has gigabytes
#   PIP_CERT a CA bundle, where a proxy of yours has a certificate of its own
#   WORK     kept from run to run, deleted by nobody (a new folder in /tmp)
set -euo pipefail
cd "$(dirname "$0")/.."
suite=${1:-noble}
extras=${EXTRAS-torch,rtx}
wheels=$(realpath "${WHEELS:-$(mktemp -d)}")
work=${WORK:-$(mktemp -d)}
case $suite in
bookworm | trixie | sid) mirror=${MIRROR:-http://deb.debian.org/debian} components=main ;;
*) mirror=${MIRROR:-http://archive.ubuntu.com/ubuntu} components=main,universe ;;
esac
for tool in debootstrap buildah; do
    command -v $tool >/dev/null || { echo "check: $tool is not installed: apt-get install $tool" >&2; exit 2; }
done
[ "$(id -u)" = 0 ] || { echo "check: a clean root can only be made by root" >&2; exit 2; }

say() { printf '\n== %s\n' "$*"; }
in_store() { # `buildah COMMAND …` on images of our own, kept below $work
    local command=$1
    shift
    buildah --root "$work/store" --runroot "$work/run" --storage-driver vfs "$command" "$@"
}

base=localhost/canny2image-base:$suite
image=localhost/canny2image:$suite
if ! in_store images -q "$base" >/dev/null 2>&1; then
    say "a clean $suite from $mirror"
    script=/usr/share/debootstrap/scripts/$suite # a debootstrap older than the suite does not know it by name
    [ -e "$script" ] || script=/usr/share/debootstrap/scripts/gutsy
    debootstrap --variant=minbase --components=$components "$suite" "$work/$suite" "$mirror" "$script" | tail -n 1
    container=$(in_store from scratch)
    in_store copy -q "$container" "$work/$suite" / >/dev/null
    in_store commit -q --rm "$container" "$base" >/dev/null
    rm -rf "${work:?}/$suite"
fi

say "the Dockerfile on it, with the extras $extras"
volumes=(--volume "$wheels:/wheels:ro") settings=(--env PIP_FIND_LINKS=/wheels)
if [ -n "${PIP_CERT:-}" ]; then
    volumes+=(--volume "$(realpath "$PIP_CERT"):/ca.crt:ro") settings+=(--env PIP_CERT=/ca.crt)
fi
container=$(in_store from "$base")
in_store config "${settings[@]}" "$container"
in_store commit -q --rm "$container" "$base-here" >/dev/null
in_store build --format docker --isolation chroot --network host "${volumes[@]}" \
    --build-arg BASE="$base-here" --build-arg EXTRAS="$extras" --tag "$image" .

container=$(in_store from "$image")
trap 'in_store rm "$container" >/dev/null' EXIT
rm -rf "${work:?}/engines" "$work/score"
install -d "$work/weights"
install -d -m 1777 "$work/engines" "$work/score" # what Docker makes of the image's volumes
run() { # as `docker run --network none -v …/weights:/weights:ro IMAGE …` does
    say "$*"
    unshare --net buildah --root "$work/store" --runroot "$work/run" --storage-driver vfs run --isolation chroot \
        --volume "$work/weights:/weights:ro" --volume "$work/engines:/engines" --volume "$work/score:/score" \
        --user "$user" "$container" -- /opt/canny2image/docker/entrypoint.sh "$@"
}
user=$(in_store inspect --format '{{.OCIv1.Config.User}}' "$container")
run id
run health
run preprocess
run preprocess # a second time, which has nothing to build
case $extras in
*torch*)
    run compute_score --images pictures/owl.png --steps 4 --schedule full
    user=4321:4321 # as `docker run --user`: someone whom the image does not know
    run compute_score --images pictures/cat.png --steps 4 --schedule full --output /score/mine
    ;;
esac
ls "$work/engines" "$work/score"
say "The Dockerfile builds on $suite, and what it made runs without a network and not as root."
