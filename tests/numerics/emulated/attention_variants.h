// attention.cu twice more, for scores on one grid and on stairs, and token_attention.cu, with heads of HEAD columns,
// which is defined where this is included. All are listed as variants.

#ifndef STEPPED

#define STEPPED 0
#include "attention_variants.h"
#undef STEPPED
#define STEPPED 1
#include "attention_variants.h"
#undef STEPPED

#define JOIN_EXPANDED(a, b) a##_##b
#define JOIN(...) JOIN_EXPANDED(__VA_ARGS__)
#define attention_sums JOIN(attention_sums, HEAD)
#define attention_mix JOIN(attention_mix, HEAD)

namespace JOIN(token_variant, HEAD) {
#include "tokens.cu"
#include "bins.cu"
#include "scores.cu"
#include "token_attention.cu"

const bool is_listed = list_tokens<TokenAttention, attention_sums, attention_mix>(HEAD);
}

#undef attention_mix
#undef attention_sums
#undef JOIN
#undef JOIN_EXPANDED
#undef HEAD

#else

// Names with C linkage are the same in every namespace.
#define JOIN_EXPANDED(a, b, c) a##_##b##_##c
#define JOIN(...) JOIN_EXPANDED(__VA_ARGS__)
#define attention JOIN(attention, HEAD, STEPPED)

namespace JOIN(variant, HEAD, STEPPED) {
#include "bins.cu"
#include "scores.cu"
#include "attention.cu"

const bool is_listed = list<Attention, attention>({HEAD, STEPPED, nullptr});
}

#undef attention
#undef JOIN
#undef JOIN_EXPANDED

#endif
