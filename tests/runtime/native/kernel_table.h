// Which kernel computes which product.
#pragma once

#include <string>

#include "kernels.h"

// The kernel that computes a product, or, where each segment has its own, those of all segments with spaces between.
std::string kernel_names(const fips::Kernels& kernels, const fips::Layout& layout, size_t m);

// Prints "ISA accuracy_level transB keep of midrise block_size columns size_8bit size_4bit size_3bit size_2bit M
// kernel…" for products of every kind (segments of rows, three blocks of columns or very many).
void print_kernel_table(const fips::Kernels& kernels);
