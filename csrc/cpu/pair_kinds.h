// The losses that pair_sums knows, by their formulas: x and y are the products s_i·s_j and t_i·t_j, A the terms of row i
// and B those of row j, c constants, g_i the upstream of row i's sum.
//
//     sums(x, y, A, B, out)         what the pair adds to the sums of row i; with `symmetric`, to those of row j too
//     slopes(x, y, A, B, g, h, …)   derivatives by x, y, A and B of what the pair adds to Σ g·sum: symmetric kinds take
//                                   g_i + g_j and give those of both rows' sums, others those of row i's alone
#pragma once
#include "numbers.h"

namespace gkd::GKD_ISA {

// Marks an element of the diagonal for kinds to which a row is no partner of its own.
template <class T>
constexpr T kOwn = T(1e30);

template <class V, int Terms>
struct Slopes {
  V x, y, a[Terms > 0 ? Terms : 1], b[Terms > 0 ? Terms : 1];
};

// Σ_j |x_ij|
template <class T, bool Moving>
struct AbsoluteSums {
  using V = Number<T, Moving>;
  static constexpr int kSides = 1, kTerms = 0, kSums = 1;
  static constexpr bool kSymmetric = true, kSkipsOwn = false;

  explicit AbsoluteSums(const PairSums<T>&) {}

  GKD_INLINE void sums(V x, V, const V*, const V*, V (&out)[kSums]) const {
    // 0 has no tangent, as it has no slope.
    out[0] = select<T>(value<T>(x) < 0, -x, select<T>(value<T>(x) == 0, still<T, Moving>(0), x));
  }

  GKD_INLINE void slopes(V x, V, const V*, const V*, V g, bool, Slopes<V, kTerms>& out) const {
    const V none = still<T, Moving>(0);
    out.x = select<T>(value<T>(x) < 0, -g, select<T>(value<T>(x) > 0, g, none));
  }
};

// The distance d = √(n_i + n_j − 2x), at least 1e-6, 0 on the diagonal. Of rows that are alike but for roundings it is the
// least one too: what is left of the difference says nothing.
template <class T, bool Moving>
struct Distance {
  using V = Number<T, Moving>;
  static constexpr T kLeastSquare = T(1e-12), kLeast = T(1e-6), kRounding = sizeof(T) == 4 ? T(2e-6) : T(4e-15);
  V d, inverse;  // inverse: 0 where d does not depend on the rows

  GKD_INLINE Distance(V x, V n_i, V n_j) {
    const V squares = n_i + n_j, square = squares - (x + x);
    const auto known = value<T>(square) > at_least<T>(value<T>(squares) * kRounding, kLeastSquare);
    const V safe = select<T>(known, square, still<T, Moving>(kLeastSquare)), none = still<T, Moving>(0);
    d = root<T>(safe);
    inverse = select<T>(known, still<T, Moving>(1) / d, none);
    d = select<T>(known, d, select<T>(value<T>(x) < kOwn<T> / 2, still<T, Moving>(kLeast), none));
  }
};

// Σ_j d_ij
template <class T, bool Moving>
struct Distances {
  using V = Number<T, Moving>;
  static constexpr int kSides = 1, kTerms = 1, kSums = 1;
  static constexpr bool kSymmetric = true, kSkipsOwn = true;

  explicit Distances(const PairSums<T>&) {}

  GKD_INLINE void sums(V x, V, const V* A, const V* B, V (&out)[kSums]) const {
    out[0] = Distance<T, Moving>(x, A[0], B[0]).d;
  }

  GKD_INLINE void slopes(V x, V, const V* A, const V* B, V g, bool, Slopes<V, kTerms>& out) const {
    const V w = g * Distance<T, Moving>(x, A[0], B[0]).inverse * still<T, Moving>(T(0.5));
    out.x = -(w + w);
    out.a[0] = out.b[0] = w;
  }
};

// Σ_j ρ(z), z = κ^s d^s − κ^t d^t, and Σ_j of its derivatives ρ' d^s, −ρ' d^t by the κ. The slopes are those of
// Σ_ij (g_i ρ(z_ij) + γ^s d^s_ij + γ^t d^t_ij). Constants: κ^s, κ^t, γ^s, γ^t.
template <class T, bool Moving>
struct RkdDistance {
  using V = Number<T, Moving>;
  static constexpr int kSides = 2, kTerms = 2, kSums = 3;
  static constexpr bool kSymmetric = true, kSkipsOwn = true;
  V kappa[2], gamma[2];

  explicit RkdDistance(const PairSums<T>& args) {
    for (int q = 0; q < 2; ++q) kappa[q] = constant(args, q), gamma[q] = constant(args, 2 + q);
  }

  static V constant(const PairSums<T>& args, int q) {
    if constexpr (Moving) return {broadcast<T>(args.constants[q]), broadcast<T>(args.constant_tangents[q])};
    else return broadcast<T>(args.constants[q]);
  }

  // z within [−1, 1], ρ' of Huber's function ρ(z) = ρ'(z − ρ'/2)
  GKD_INLINE static V slope(V z) {
    const V one = still<T, Moving>(1);
    return select<T>(value<T>(z) > 1, one, select<T>(value<T>(z) < -1, -one, z));
  }

  GKD_INLINE void sums(V x, V y, const V* A, const V* B, V (&out)[kSums]) const {
    const V s = Distance<T, Moving>(x, A[0], B[0]).d, t = Distance<T, Moving>(y, A[1], B[1]).d;
    const V z = kappa[0] * s - kappa[1] * t, rho = slope(z);
    out[0] = rho * (z - rho * still<T, Moving>(T(0.5)));
    out[1] = rho * s;
    out[2] = -(rho * t);
  }

  GKD_INLINE void slopes(V x, V y, const V* A, const V* B, V g, bool teacher, Slopes<V, kTerms>& out) const {
    const Distance<T, Moving> s(x, A[0], B[0]), t(y, A[1], B[1]);
    const V half = still<T, Moving>(T(0.5)), rho = slope(kappa[0] * s.d - kappa[1] * t.d) * g * half;
    const V w = (kappa[0] * rho + gamma[0]) * s.inverse;
    out.x = -(w + w);
    out.a[0] = out.b[0] = w;
    if (!teacher) return;
    const V u = (gamma[1] - kappa[1] * rho) * t.inverse;
    out.y = -(u + u);
    out.a[1] = out.b[1] = u;
  }
};

// Σ_j (K(x) − K(y))², K(x) = Σ_p c_p x^p
template <class T, bool Moving>
struct Polynomial {
  using V = Number<T, Moving>;
  static constexpr int kSides = 2, kTerms = 0, kSums = 1;
  static constexpr bool kSymmetric = true, kSkipsOwn = false;
  const T* c;
  int64_t degree;

  explicit Polynomial(const PairSums<T>& args) : c(args.constants), degree(args.constant_count - 1) {}

  struct Of {
    V k, slope;
  };
  GKD_INLINE Of at(V x) const {
    V k = still<T, Moving>(c[degree]), slope = still<T, Moving>(0);
    for (int64_t p = degree - 1; p >= 0; --p) {
      slope = slope * x + k;
      k = k * x + still<T, Moving>(c[p]);
    }
    return {k, slope};
  }

  GKD_INLINE void sums(V x, V y, const V*, const V*, V (&out)[kSums]) const {
    const V difference = at(x).k - at(y).k;
    out[0] = difference * difference;
  }

  GKD_INLINE void slopes(V x, V y, const V*, const V*, V g, bool teacher, Slopes<V, kTerms>& out) const {
    const Of s = at(x), t = at(y);
    const V twice = (g + g) * (s.k - t.k);
    out.x = twice * s.slope;
    if (teacher) out.y = -(twice * t.slope);
  }
};

// Σ_j q log((q + ε)/(p + ε)), p = A_0 (1 + x), q = A_1 (1 + y). Constants: ε.
template <class T, bool Moving>
struct Pkt {
  using V = Number<T, Moving>;
  static constexpr int kSides = 2, kTerms = 2, kSums = 1;
  static constexpr bool kSymmetric = false, kSkipsOwn = false;
  V eps;

  explicit Pkt(const PairSums<T>& args) : eps(still<T, Moving>(args.constants[0])) {}

  // 1 + x, not below 0 where rounded rows are longer than 1.
  GKD_INLINE static V shifted(V x) {
    const V u = x + still<T, Moving>(1);
    return select<T>(value<T>(u) < 0, still<T, Moving>(0), u);
  }

  GKD_INLINE void sums(V x, V y, const V* A, const V*, V (&out)[kSums]) const {
    const V p = A[0] * shifted(x), q = A[1] * shifted(y);
    out[0] = q * logarithm<T>((q + eps) / (p + eps));
  }

  GKD_INLINE void slopes(V x, V y, const V* A, const V*, V g, bool teacher, Slopes<V, kTerms>& out) const {
    const V none = still<T, Moving>(0), u = shifted(x), v = shifted(y);
    const V p = A[0] * u, q = A[1] * v, by_p = -(g * q / (p + eps));
    out.x = by_p * A[0];
    out.a[0] = by_p * u;
    out.b[0] = out.b[1] = out.a[1] = none;
    if (!teacher) return;
    const V by_q = g * (logarithm<T>((q + eps) / (p + eps)) + q / (q + eps));
    out.y = by_q * A[1];
    out.a[1] = by_q * v;
  }
};

}  // namespace gkd::GKD_ISA
