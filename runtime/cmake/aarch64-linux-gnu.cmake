# 64-bit Arm Linux, with the cross compiler that Debian and Ubuntu have as g++-aarch64-linux-gnu. A relative path is
# looked up beside runtime/CMakeLists.txt:
#     cmake -S runtime -B build -DCMAKE_TOOLCHAIN_FILE=cmake/aarch64-linux-gnu.cmake
set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_SYSTEM_PROCESSOR aarch64)
set(CMAKE_CXX_COMPILER aarch64-linux-gnu-g++)
