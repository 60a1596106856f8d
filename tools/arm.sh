#!/usr/bin/env bash
# Build the kernels for 64-bit ARM and run their tests there, emulated: on an x86 machine with Debian,
# its packages g++-aarch64-linux-gnu and qemu-user-static, and some 20 minutes.
#
# Usage: tools/arm.sh [FOLDER [arguments of pytest]]     everything is kept in FOLDER (build/arm)
# TORCH names the version; after 2.9 the wheels for ARM need CUDA's libraries. TORCH=2.4.0 with
# CONSTRAINTS=constraints-min.txt are the oldest versions promised.
set -euo pipefail
cd "$(dirname "$0")/.."
folder=$(realpath -m "${1:-build/arm}")
shift || true
torch=${TORCH:-2.9.1}
constraints=$(realpath "${CONSTRAINTS:-constraints.txt}")
root=$folder/root site=$folder/site-$torch package=$folder/package
needed=(cloudpickle filelock fsspec iniconfig jinja2 joblib markupsafe mpmath narwhals networkx
  numpy packaging pandas pluggy pygments pytest python-dateutil pytz safetensors scikit-learn scipy six
  skorch sympy tabulate threadpoolctl tqdm typing-extensions
  tzdata)

if [ ! -e "$root/usr/bin/python3.11" ]; then
  mkdir -p "$root" "$folder"/{lists,cache/archives}/partial
  touch "$folder/status"
  apt=(apt-get -qq -o APT::Architecture=arm64 -o APT::Architectures=arm64
    -o Dir::State::Lists="$folder/lists" -o Dir::State::status="$folder/status"
    -o Dir::Cache="$folder/cache")
  "${apt[@]}" update
  "${apt[@]}" install -y --no-install-recommends --download-only python3.11 libpython3.11-dev \
    python3-distutils libstdc++6 libgomp1
  for package_file in "$folder"/cache/archives/*.deb; do dpkg -x "$package_file" "$root"; done
fi
if [ ! -e "$site/torch" ]; then
  python3 -m pip install -q --no-deps --only-binary=:all: --python-version 3.11 \
    --implementation cp --platform manylinux_2_28_aarch64 --platform manylinux_2_17_aarch64 \
    --platform manylinux2014_aarch64 --platform any --target "$site" \
    -c <(grep -v '^torch==' "$constraints") "${needed[@]}" "torch==$torch"
fi

rm -rf "$package"
mkdir -p "$package"
cp -r sklearn_maml tests pyproject.toml "$package"
native=$package/sklearn_maml/native
rm -f "$native"/*.so
# the flags are those of setup.py
flags=(-fPIC -O3 -g0 -fno-math-errno -fno-trapping-math -fvisibility=hidden -pthread -std=c++11)
digest=$(cat $(ls sklearn_maml/native/*.cpp sklearn_maml/native/*.h | LC_ALL=C sort) | sha256sum)
for real in float double; do
  for name in mlp head; do
    aarch64-linux-gnu-g++ "${flags[@]}" -DLEVEL=base -DREAL=$real \
      -DREAL_IS_DOUBLE=$([ $real = double ] && echo 1 || echo 0) \
      -c "$native/$name.cpp" -o "$folder/$name-$real.o" &
  done
done
aarch64-linux-gnu-g++ "${flags[@]}" -DHAS_X86_LEVELS=0 -DSOURCES="\"${digest%% *}\"" \
  -DPy_LIMITED_API=0x030B0000 -isystem "$root/usr/include/python3.11" -isystem "$root/usr/include" \
  -c "$native/module.cpp" -o "$folder/module.o"
wait
aarch64-linux-gnu-g++ -shared -pthread "$folder"/*.o -o "$native/_kernels.abi3.so"

cd "$package"
[ $# -gt 0 ] || set -- tests/test_native.py tests/test_head_kernel.py tests/test_posterior_kernel.py
# processes of joblib cannot be started in an emulator
exec env PYTHONPATH="$package:$site" OMP_NUM_THREADS=1 qemu-aarch64-static -L "$root" \
  "$root/usr/bin/python3.11" -m pytest -q -p no:cacheprovider \
  --deselect tests/test_native.py::test_workers_of_joblib "$@"
