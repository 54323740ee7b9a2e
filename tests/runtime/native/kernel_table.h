// Which kernel computes which product.
#pragma once

#include "kernels.h"

// Prints "ISA accuracy_level transB keep of midrise block_size columns size_8bit size_4bit size_3bit size_2bit M
// kernel" for products of every kind (segments of rows, three blocks of columns or very many).
void print_kernel_table(const fips::Kernels& kernels);
