// product.cu twice more, with a code and with two codes of the right operand a byte, for the TILING (as
// src/kernels/cuda/product.rs calls and defines it), STEP and FORM that are defined where this is included.
// Both are listed as variants.

#ifndef NIBBLES

#define NIBBLES 0
#include "product_variants.h"
#undef NIBBLES
#define NIBBLES 1
#include "product_variants.h"
#undef NIBBLES
#undef FORM
#undef STEP
#undef TILING

#else

#if TILING == LARGE
#define TILING_NAME "large"
#define BM 128
#define BN 128
#define WM 64
#define WN 32
#define STAGES 3
#elif TILING == MIDDLE
#define TILING_NAME "middle"
#define BM 128
#define BN 64
#define WM 32
#define WN 32
#define STAGES 3
#elif TILING == SMALL
#define TILING_NAME "small"
#define BM 64
#define BN 64
#define WM 32
#define WN 32
#define STAGES 3
#elif TILING == WIDE
#define TILING_NAME "wide"
#define BM 64
#define BN 128
#define WM 64
#define WN 32
#define STAGES 2
#elif TILING == NARROW
#define TILING_NAME "narrow"
#define BM 64
#define BN 64
#define WM 32
#define WN 32
#define STAGES 2
#endif

#define SINGLE (FORM != SEGMENTS)
#define FIXED (FORM == TO_VALUES || FORM == TO_CODES)
#define CODES (FORM == TO_CODES)
#define BLOCKS 1

// Names with C linkage are the same in every namespace.
#define JOIN_EXPANDED(a, b, c, d, e) a##_##b##_##c##_##d##_##e
#define JOIN(...) JOIN_EXPANDED(__VA_ARGS__)
#define product JOIN(product, TILING, STEP, FORM, NIBBLES)

namespace JOIN(variant, TILING, STEP, FORM, NIBBLES) {
#include "finish.cu"
#include "product.cu"

const bool is_listed = list<Product, product>(
    {TILING_NAME, FORM, BM, BN, STEP, STAGES, BM / WM * (BN / WN) * 32, NIBBLES, nullptr});
}

#undef product
#undef JOIN
#undef JOIN_EXPANDED
#undef BLOCKS
#undef CODES
#undef FIXED
#undef SINGLE
#undef STAGES
#undef WN
#undef WM
#undef BN
#undef BM
#undef TILING_NAME

#endif
