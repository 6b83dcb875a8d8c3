# cmake -B build-arm64 --toolchain aarch64-linux.cmake -Dexecutorch_DIR=<the unpacked aarch64 wheel>/executorch/share/cmake
set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_SYSTEM_PROCESSOR aarch64)
set(CMAKE_CXX_COMPILER aarch64-linux-gnu-g++)
set(CMAKE_FIND_ROOT_PATH_MODE_PROGRAM NEVER)
