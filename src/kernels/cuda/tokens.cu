// Which rows of an operand are parts of the same token.

// Where the tokens of an operand are: blocks (a head of a window) of rows of `width` values. Blocks share
// a set of tokens: the heads of a window, or of the windows of a quadrant of `half` × `half` windows.
struct Tokens {
  int rows, width, heads, half;
};

__device__ __forceinline__ int members(Tokens t) { return t.heads * (t.half ? t.half * t.half : 1); }

__device__ __forceinline__ int set_of(Tokens t, int block) {
  const int window = block / t.heads;
  if (!t.half) return window;
  const int side = 2 * t.half, image = window / (side * side);
  const int row = window % (side * side) / side, column = window % side;
  return (image * 2 + row / t.half) * 2 + column / t.half;
}

__device__ __forceinline__ int block_of(Tokens t, int set, int member) {
  const int head = member % t.heads, place = member / t.heads;
  if (!t.half) return set * t.heads + head;
  const int side = 2 * t.half;
  const int row = set / 2 % 2 * t.half + place / t.half, column = set % 2 * t.half + place % t.half;
  return ((set / 4 * side + row) * side + column) * t.heads + head;
}
