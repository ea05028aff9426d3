// attention.cu twice more, for scores on one grid and on stairs, with heads of HEAD columns, which is defined
// where this is included. Both are listed as variants.

#ifndef STEPPED

#define STEPPED 0
#include "attention_variants.h"
#undef STEPPED
#define STEPPED 1
#include "attention_variants.h"
#undef STEPPED
#undef HEAD

#else

// Names with C linkage are the same in every namespace.
#define JOIN_EXPANDED(a, b, c) a##_##b##_##c
#define JOIN(...) JOIN_EXPANDED(__VA_ARGS__)
#define attention JOIN(attention, HEAD, STEPPED)

namespace JOIN(variant, HEAD, STEPPED) {
#include "attention.cu"

const bool is_listed = list<Attention, attention>({HEAD, STEPPED, nullptr});
}

#undef attention
#undef JOIN
#undef JOIN_EXPANDED

#endif
