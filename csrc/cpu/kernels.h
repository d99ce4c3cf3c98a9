// What the kernels of one instruction set offer, and what they need from their host. Raw pointers alone: this header
// and those of the kernels define no function that another instruction set's copy could replace at link time.
#pragma once
#include <cstdint>

namespace gkd {

using Bfloat16 = uint16_t;  // its bits

// c[m][n] (+)= Σ_k a[m][k] · b[k][n] with operands in bfloat16: b in pairs, element (k, n) at b[(k/2·b_lead + n)·2 + k%2].
struct Bfloat16Product {
  int64_t rows, columns, depth;  // depth: even
  const Bfloat16* a;
  int64_t a_lead;
  const Bfloat16* b;
  int64_t b_lead;
  float* c;
  int64_t c_lead;
  bool accumulate;
};

// Threads and memory, lent by the caller for the time of one call.
struct Host {
  using Body = void (*)(void* context, int64_t begin, int64_t end, int64_t worker);
  void* self;
  int64_t workers;  // worker < workers in every Body
  int64_t block;    // for tests: rows per tile, a multiple of 32, by all workers; 0: the kernel chooses both
  // grain: what a thread is worth starting for
  void (*run)(void* self, int64_t count, int64_t grain, Body body, void* context);
  void (*yield)();                               // lets other threads have the processor
  void* (*allocate)(void* self, int64_t bytes);  // aligned to 64 bytes, not cleared
  // Null: tiles of float32 are multiplied in float32. Never throws, for others wait for the tile: `run` does in the end.
  void (*multiply)(void* self, const Bfloat16Product&);
};

// A matrix of unit rows, row-major and contiguous, and as columns of the tiles: the same matrix in the symmetric case.
template <class T>
struct Sides {
  const T* rows;     // [row_count, dim]
  const T* columns;  // [column_count, dim]
  int64_t row_count;
  int64_t column_count;
  int64_t dim;
  int64_t offset;   // row i's own column is i + offset
  bool symmetric;   // columns are the rows: upper tiles serve both sides
};

// A per-row quantity [count] on both sides; the same pointer twice in the symmetric case.
template <class T>
struct Terms {
  const T* row;
  const T* column;
};

// A per-row quantity on both sides, in float64: what a rounding to T leaves of it is `low`.
template <class T>
struct WideTerms {
  Terms<T> high, low;
};

constexpr int kMaxStages = 64;
constexpr int kMaxPairs = kMaxStages * kMaxStages / 4;  // S·T where S + T = kMaxStages

template <class T>
struct RelationKl {
  int64_t students, teachers;
  Sides<T> stages[kMaxStages];  // students, then teachers
  T inner;                      // log2(e)/σ²
  T outer;                      // log2(e)/τ
  // Base-2 shifts of the rows' sums, [students + teachers][count], or null: the shift is `outer` everywhere.
  Terms<T> shifts[kMaxStages];
  // Forward: Z per stage and Q per pair, each [row_count], cleared by the caller.
  double* sums;       // [students + teachers][row_count]
  double* pair_sums;  // [students · teachers][row_count], or with divergences [students · teachers][2][row_count]
  bool divergences;   // see relation_kl.h; only where products are rounded
  // Backward: factors of U, see relation_kl.h, and gradients [row_count, dim] or null, cleared by the caller.
  Terms<T> alpha[kMaxStages];  // per student
  const Terms<T>* beta;        // per pair
  const WideTerms<T>* levels;  // h per pair
  T inverse_temperature;
  T* gradients[kMaxStages];
  // R of the upper tiles, [tile][stage], or null: the forward pass writes it, the backward pass reads it.
  T* affinities;
};

// Second order: a direction of a stage, by which its similarities move at ċ = ẋ_i·y_j + x_i·ẏ_j; null: it stands still.
template <class T>
struct RelationKlTangent {
  // sums: Σ_j U R˙ per stage, then Σ_j U; pair_sums: Σ_j U^t [(R^t − R^s)/τ R˙^t − R˙^s]
  RelationKl<T> relations;
  Terms<T> tangents[kMaxStages];
  T inverse_variance;
  // Double backward: tangents of α, β, h.
  Terms<T> alpha[kMaxStages];
  const Terms<T>* beta;
  const WideTerms<T>* levels;
};

template <class T>
struct SoftmaxSums {
  Sides<T> sides;      // never symmetric
  T scale;             // log2(e)/τ
  const T* row_shift;  // base 2, [row_count], or null
  const T* column_shift;   // base 2, [column_count], or null
  const T* column_factor;  // [column_count], or null
  const T* values;         // [column_count, dim] or null
  const T* own;            // taken from the weight of row i's own column, [row_count], or null
  double* sums;            // [row_count] or null, cleared by the caller
  double* weight_sums;     // of the weights as they are multiplied with the values: likewise
  T* weighted;             // [row_count, dim], cleared by the caller; with values
  T* maxima;               // [row_count]: only the largest c of each row is wanted, or null
  T* own_cosines;          // [row_count]: of the own columns, as tiles have them, or null
  // [row_count, 2], cleared by the caller, or null: weights of the own columns as multiplied, and what rounding added to
  // them. The own values then count unrounded and cancel with what the caller takes from the mean; with sums, weight_sums.
  T* own_weights;
  const T* centred_on;     // rows, [centred_on_count, dim], whose mean is the centre, or null: the columns'
  int64_t centred_on_count;
};

// Second order: with ċ_ij = ẋ_i·y_j + x_i·ẏ_j the moving part of w_ij is w_ij (ċ_ij/τ − row_term_i − column_term_j).
template <class T>
struct SoftmaxTangent {
  SoftmaxSums<T> softmax;    // values are the columns; sums and weighted are those of the moving part
  Terms<T> tangents;         // ẋ, ẏ [count, dim] or null; Σ_j w_ij ẏ_j is part of weighted
  T inverse_temperature;
  const T* row_term;         // [row_count] or null
  const T* column_term;      // [column_count] or null
};

template <class T>
struct KernelSums {
  Sides<T> sides;
  T scale;           // log2(e)/σ²
  const T* values;   // of the columns, [column_count, width], or null
  const T* factors;  // of the values, [column_count], or null: 1
  int64_t width;
  double* degrees;   // [row_count] or null, cleared by the caller
  T* output;         // [row_count, width], cleared by the caller; with values
  T* affinities;     // K of the upper tiles, or null
  bool known;        // it is read instead of written; then there are no degrees
};

template <class T>
struct NodeGradient {
  Sides<T> sides;
  T scale;               // log2(e)/σ²
  T inverse_variance;
  Terms<T> left, right;  // G' and H', [count, width]
  Terms<T> left_factors, right_factors;  // of these, [count], or null: 1
  int64_t width;
  Terms<T> terms;        // d, [count]
  T* gradient;           // [row_count, dim], cleared by the caller
  T* messages_gradient;  // Σ_j K_ij G'_j of left, [row_count, width], cleared by the caller, or null
  T* affinities;         // K of the upper tiles, or null
};

// Cosines of the upper tiles, own ones out of reach, or null; known: they are read instead of written.
template <class T>
struct KeptCosines {
  T* tiles;
  bool known;
};

template <class T>
struct NeighborSums {
  Sides<T> sides;
  KeptCosines<T> kept;
  T scale;       // log2(e)/σ²
  T* shifts;     // [row_count]: at last each row's largest exponent, in base 2; at first below all of them
  double* sums;  // [4][row_count], cleared by the caller: of w, w², w x and w² x; x in base 2, w = exp2(x − shift)
};

template <class T>
struct NeighborConv {
  Sides<T> sides;
  KeptCosines<T> kept;
  T scale;  // log2(e)/σ²
  // What is taken from the exponents of A_ij, in base 2, and in the symmetric case from those of A_ji if that differs.
  WideTerms<T> shares, transposed_shares;
  bool transposes;
  const T* values;  // of the columns, [column_count, width]
  int64_t width;
  T* output;        // [row_count, width], cleared by the caller
};

template <class T>
struct NeighborGradient {
  Sides<T> sides;
  KeptCosines<T> kept;
  T scale;  // log2(e)/σ²
  T inverse_variance;
  bool symmetric;         // the normalization
  WideTerms<T> log_sums;  // in base 2
  Terms<T> left, right;   // G and m, [count, width]
  int64_t width;
  Terms<T> terms;         // d, [count], or null: 0
  // Y and of the symmetric normalization the messages' gradient, [row_count, width], of which d is made; or null: it is
  // given. Only in the symmetric case.
  const T *output, *messages_gradient;
  const T* weight_sums;   // Σ_j p_ij as these log-sums give them, [row_count], by which d is divided; or null: 1
  T* gradient;            // [row_count, dim], cleared by the caller
};

// Second order: K˙_ij = K_ij ċ_ij/σ², and values that move at ẋ_j = rates_j x_j (+ extra_j for the first of them).
template <class T>
struct KernelSumsTangent {
  Sides<T> sides;
  T scale;  // log2(e)/σ²
  T inverse_variance;
  Terms<T> tangents;  // ė [count, dim]
  double* degrees;    // Σ_j K˙_ij [row_count] or null, cleared by the caller
  int64_t parts;      // up to 2
  Terms<T> values[2], rates[2];  // [count, width], [count]
  int64_t widths[2];
  T* outputs[2];      // Σ_j (K˙_ij x_j + K_ij ẋ_j) [row_count, width], cleared by the caller
  const T* extra;     // [column_count, widths[0]] or null
};

template <class T>
struct NodeGradientTangent {
  NodeGradient<T> gradient;      // gradient: the tangent of the nodes' gradient, cleared by the caller
  Terms<T> tangents;             // ė [count, dim]
  Terms<T> left_rates, right_rates, extra, terms;  // Ġ' = left_rates ⊙ G', Ḣ' = right_rates ⊙ H' + extra; ḋ
};

// Students against teachers, both ways.
template <class T>
struct InfoNce {
  Sides<T> sides;  // students and teachers, as many; walked as if symmetric
  T scale;         // log2(e)/τ
  const T *row_shift, *column_shift;    // base 2, [row_count], or null: `scale`
  T *row_maxima, *column_maxima;        // only the largest c of each are wanted, or null
  double *row_sums, *column_sums;       // forward: [row_count], cleared by the caller, or null
  T* own_products;                      // forward: c_ii, of the roundings that the sums have
  const T *row_factor, *column_factor;  // backward: a, b, [row_count]
  const T* own;                         // taken from the weight of row i and column i
  T* gradients[2];                      // [row_count, dim], cleared by the caller, or null
};

enum class PairKind { absolute_sums, distances, rkd_distance, polynomial, pkt };

constexpr int kMaxPairTerms = 2, kMaxPairSums = 3;

// A loss over pairs of rows, pair_kinds.h, of one or two graphs with the same nodes: sums over each row's partners, or
// the gradients of Σ g·sum. With directions, which may be null, of rows, terms and constants: their tangents.
template <class T>
struct PairSums {
  PairKind kind;
  bool moving;      // tangents are wanted
  Sides<T> sides[2];
  Terms<T> tangents[2];  // [count, dim] or null
  Terms<T> terms[kMaxPairTerms], term_tangents[kMaxPairTerms];  // [count]
  const T *constants, *constant_tangents;
  int64_t constant_count;
  double* sums;         // forward: [sums][row_count], cleared by the caller
  Terms<T> upstream;    // backward: g, [count]
  T* gradients[2];      // [row_count, dim], cleared by the caller, or null
  double* term_sums;    // gradients of the terms, [terms][row_count], cleared by the caller
};

// Angles at every node between every two others, of two graphs with the same nodes.
template <class T>
struct RkdAngle {
  Sides<T> sides[2];
  const T* norms[2];       // x_i·x_i, [row_count]
  double* sums;            // forward: [row_count], cleared by the caller, or null
  const T* upstream;       // backward: [row_count]
  T* gradients[2];         // [row_count, dim], cleared by the caller, or null
  double* weight_sums[2];  // of the wanted gradients: [row_count], cleared by the caller
};

template <class T>
struct UnitRows {
  const T* rows;
  int64_t count, dim;
  T* unit;
  T* inverse_norms;
};

template <class T>
struct UnitRowsBackward {
  const T* upstream;
  const T* unit;
  const T* inverse_norms;
  int64_t count, dim;
  T* gradient;
};

template <class T>
struct RowDots {
  const T *a, *b;  // [count, width]
  int64_t count, width;
  double* out;     // [count]
};

template <class T>
struct Kernels {
  void (*relation_kl_maxima)(const Host&, const RelationKl<T>&, T* const* maxima);
  void (*relation_kl)(const Host&, const RelationKl<T>&);
  void (*relation_kl_backward)(const Host&, const RelationKl<T>&);
  void (*softmax_sums)(const Host&, const SoftmaxSums<T>&);
  void (*kernel_sums)(const Host&, const KernelSums<T>&);
  void (*node_gradient)(const Host&, const NodeGradient<T>&);
  void (*neighbor_sums)(const Host&, const NeighborSums<T>&);
  void (*neighbor_conv)(const Host&, const NeighborConv<T>&);
  void (*neighbor_gradient)(const Host&, const NeighborGradient<T>&);
  void (*relation_kl_tangent)(const Host&, const RelationKlTangent<T>&);
  void (*relation_kl_double_backward)(const Host&, const RelationKlTangent<T>&);
  void (*softmax_tangent)(const Host&, const SoftmaxTangent<T>&);
  void (*kernel_sums_tangent)(const Host&, const KernelSumsTangent<T>&);
  void (*node_gradient_tangent)(const Host&, const NodeGradientTangent<T>&);
  void (*info_nce)(const Host&, const InfoNce<T>&);
  void (*pair_sums)(const Host&, const PairSums<T>&);
  void (*pair_sums_backward)(const Host&, const PairSums<T>&);
  void (*rkd_angle)(const Host&, const RkdAngle<T>&);
  void (*unit_rows)(const Host&, const UnitRows<T>&);
  void (*unit_rows_backward)(const Host&, const UnitRowsBackward<T>&);
  void (*row_dots)(const Host&, const RowDots<T>&);
  int64_t (*upper_tiles_elements)(const Host&, int64_t rows);
};

struct InstructionSet {
  const char* name;
  Kernels<float> float32;
  Kernels<double> float64;
};

extern const InstructionSet baseline;
#if defined(__x86_64__)
extern const InstructionSet avx2;
extern const InstructionSet avx512;
#endif

}  // namespace gkd
