#include "kernels.h"
#include "math.h"

#ifndef FASTMETA_ISA
#define FASTMETA_ISA plain
#endif

namespace fastmeta::adaptive_update::FASTMETA_ISA {
namespace {

template <class R>
const R zeros[piece_length<R>] = {};

// A piece of a task's row.
template <class R>
const R* read(const Matrix<const R>& x, std::int64_t t, std::int64_t begin) {
  return x.data == nullptr ? zeros<R> : x.data + t * x.row + begin;
}

template <class R>
R* write(const Matrix<R>& x, std::int64_t t, std::int64_t begin) {
  return x.data == nullptr ? nullptr : x.data + t * x.row + begin;
}

template <class R>
Moments<const R*> read(const States<const R>& x, std::int64_t t, std::int64_t begin) {
  return {read(x.first, t, begin), read(x.second, t, begin), read(x.largest, t, begin), read(x.buffer, t, begin)};
}

template <class R>
Moments<R*> write(const States<R>& x, std::int64_t t, std::int64_t begin) {
  return {write(x.first, t, begin), write(x.second, t, begin), write(x.largest, t, begin), write(x.buffer, t, begin)};
}

// Elements from p on: one, or as many as a vector holds.
template <class V, class R>
FASTMETA_INLINE V get(const R* p) {
  if constexpr (sizeof(V) == sizeof(R))
    return *p;
  else
    return load(p);
}

template <class V, class R>
FASTMETA_INLINE void put(R* p, V v) {
  if constexpr (sizeof(V) == sizeof(R))
    *p = v;
  else
    store(p, v);
}

// Parts that a form has not are neither read nor written.
template <int F, class V, class R>
FASTMETA_INLINE Moments<V> get(const Moments<const R*>& x, std::int64_t i) {
  using Has = Form<F>;
  Moments<V> v{};
  if constexpr (Has::first) v.first = get<V>(x.first + i);
  v.second = get<V>(x.second + i);
  if constexpr (Has::largest) v.largest = get<V>(x.largest + i);
  if constexpr (Has::buffer) v.buffer = get<V>(x.buffer + i);
  return v;
}

template <int F, class V, class R>
FASTMETA_INLINE void put(const Moments<R*>& x, std::int64_t i, const Moments<V>& v) {
  using Has = Form<F>;
  if constexpr (Has::first) put(x.first + i, v.first);
  put(x.second + i, v.second);
  if constexpr (Has::largest) put(x.largest + i, v.largest);
  if constexpr (Has::buffer) put(x.buffer + i, v.buffer);
}

// The numbers of a step by themselves: no array that is written can be them.
template <class R>
struct Constants {
  R c[coefficients];
  explicit Constants(const R (&from)[coefficients]) { __builtin_memcpy(c, from, sizeof c); }
};

// The rates of a piece: one, or one an element.
template <class R, bool per_element>
struct Alpha {
  const R* p;
  R one;
  template <class V>
  FASTMETA_INLINE V at(std::int64_t i) const {
    if constexpr (per_element) return get<V>(p + i);
    return V{} + one;
  }
};

template <class R, bool per_element>
Alpha<R, per_element> rates_of(const R* alpha, const Piece& piece) {
  const R* p = alpha + (per_element ? piece.begin : piece.entry);
  return {p, *p};
}

// one(first element, zero of the type to work in), vector by vector, and for the rest element by element.
template <class R, class One>
FASTMETA_INLINE void over(std::int64_t n, One one) {
  std::int64_t i = 0;
  for (; i + width<R> <= n; i += width<R>) one(i, Vector<R>{});
  for (; i < n; ++i) one(i, R{});
}

template <int F, bool per_element, class R>
void step_piece(const StepArgs<R>& a, std::int64_t t, const Piece& piece) {
  const R* phi = read(a.phi, t, piece.begin);
  const R* g = read(a.g, t, piece.begin);
  R* phi_after = write(a.phi_after, t, piece.begin);
  const auto before = read(a.before, t, piece.begin);
  const auto after = write(a.after, t, piece.begin);
  const auto alpha = rates_of<R, per_element>(a.alpha, piece);
  const Constants<R> numbers(a.c);
  const R* c = numbers.c;
  over<R>(piece.end - piece.begin, [&](std::int64_t i, auto zero) {
    using V = decltype(zero);
    const V p = get<V>(phi + i);
    const auto f = forward<F, R, V>(c, p, get<V>(g + i), get<F, V>(before, i));
    put<V>(phi_after + i, p - alpha.template at<V>(i) * f.along);
    put<F, V>(after, i, f.after);
  });
}

template <int F, class R>
void step(const StepArgs<R>& a, std::int64_t first, std::int64_t last) {
  for (std::int64_t item = first; item < last; ++item) {
    const std::int64_t t = item / a.count;
    const Piece piece = a.pieces[item % a.count];
    if (a.per_element)
      step_piece<F, true>(a, t, piece);
    else
      step_piece<F, false>(a, t, piece);
  }
}

// sums[lane] += x[lane] * y[lane]. Products of two floats are exact in double.
FASTMETA_INLINE void add(double* sums, float x, float y) {
  *sums += static_cast<double>(x) * static_cast<double>(y);
}

FASTMETA_INLINE void add(double* sums, double x, double y) { *sums += x * y; }

template <class V>
FASTMETA_INLINE void add(double* sums, V x, V y) {
  typedef double Wide __attribute__((vector_size(sizeof(V) / sizeof(x[0]) * sizeof(double))));
  Wide w;
  __builtin_memcpy(&w, sums, sizeof w);
  w += __builtin_convertvector(x, Wide) * __builtin_convertvector(y, Wide);
  __builtin_memcpy(sums, &w, sizeof w);
}

using Lanes = double[terms][lanes];

template <int F, class V>
FASTMETA_INLINE void add(Lanes& sums, int l, V one, V phi, const Moments<V>& s, const Forward<V>& f,
                         const Backward<V>& b) {  // (21)
  using Has = Form<F>;
  add(sums[decay] + l, phi, b.d);
  if constexpr (Has::first) add(sums[keep_first] + l, s.first, b.first);
  if constexpr (Has::first) add(sums[take_first] + l, f.d, b.first);
  add(sums[keep_second] + l, s.second, b.second);
  add(sums[take_second] + l, V(f.d * f.d), b.second);
  add(sums[of_first] + l, Has::averaged ? f.after.first : f.d, b.numerator);
  add(sums[of_second] + l, f.after.largest, b.inside);
  add(sums[eps_root] + l, one, b.inside);
  add(sums[eps] + l, one, b.denominator);
  if constexpr (Has::buffer) add(sums[momentum] + l, s.buffer, b.buffer);
  add(sums[shrink] + l, phi, b.along);
}

// `columns` are the gradients to alpha where it has one entry an element: as many as the piece has.
template <int F, bool per_element, bool summing, class R>
void adjoint_piece(const AdjointArgs<R>& a, std::int64_t t, const Piece& piece, Lanes& sums, double* columns) {
  const R* phi = read(a.phi, t, piece.begin);
  const R* g = read(a.g, t, piece.begin);
  const R* lam = read(a.lam, t, piece.begin);
  R* u = write(a.u, t, piece.begin);
  R* lam_before = write(a.lam_before, t, piece.begin);
  const auto before = read(a.before, t, piece.begin);
  const auto d_after = read(a.d_after, t, piece.begin);
  const auto d_before = write(a.d_before, t, piece.begin);
  const auto alpha = rates_of<R, per_element>(a.alpha, piece);
  const Constants<R> numbers(a.c);
  const R* c = numbers.c;
  over<R>(piece.end - piece.begin, [&](std::int64_t i, auto zero) {
    using V = decltype(zero);
    const V p = get<V>(phi + i), cotangent = get<V>(lam + i);
    const auto s = get<F, V>(before, i);
    const auto f = forward<F, R, V>(c, p, get<V>(g + i), s);
    const auto b = backward<F, R, V>(c, f, s, alpha.template at<V>(i), cotangent, get<F, V>(d_after, i));
    put<V>(u + i, -b.d);
    if (lam_before != nullptr) put<V>(lam_before + i, cotangent + c[decay] * b.d + c[shrink] * b.along);
    put<F, V>(d_before, i, b.before);
    if constexpr (summing) {
      add<F, V>(sums, static_cast<int>(i % lanes), V(zero + R(1)), p, s, f, b);
      add(per_element ? columns + i : sums[of_alpha] + i % lanes, V(-f.along), cotangent);
    }
  });
}

template <int F, bool summing, class R>
void adjoint_items(const AdjointArgs<R>& a, std::int64_t first, std::int64_t last) {
  const bool by_columns = summing && a.per_element;
  for (std::int64_t item = first; item < last; ++item) {
    const Piece piece = a.pieces[item % a.count];
    Lanes sums = {};
    double columns[piece_length<R>];
    if (by_columns) {
      for (std::int64_t i = 0; i < piece.end - piece.begin; ++i) columns[i] = 0;
      for (std::int64_t t = 0; t < a.tasks; ++t) adjoint_piece<F, true, summing>(a, t, piece, sums, columns);
      for (std::int64_t p = piece.begin; p < piece.end; ++p) a.d_alpha[p] = static_cast<R>(columns[p - piece.begin]);
    } else if (a.per_element) {
      adjoint_piece<F, true, summing>(a, item / a.count, piece, sums, columns);
    } else {
      adjoint_piece<F, false, summing>(a, item / a.count, piece, sums, columns);
    }
    if (!summing) continue;
    for (int k = 0; k < terms; ++k) {
      for (int half = lanes / 2; half > 0; half /= 2)
        for (int l = 0; l < half; ++l) sums[k][l] += sums[k][l + half];
      a.sums[item * terms + k] = sums[k][0];
    }
  }
}

template <int F, class R>
void adjoint(const AdjointArgs<R>& a, std::int64_t first, std::int64_t last) {
  if (a.sums != nullptr)
    adjoint_items<F, true>(a, first, last);
  else
    adjoint_items<F, false>(a, first, last);
}

template <class R>
constexpr Kernels<R> kernels = {
    {step<0, R>, step<1, R>, step<2, R>, step<3, R>, step<4, R>, step<5, R>},
    {adjoint<0, R>, adjoint<1, R>, adjoint<2, R>, adjoint<3, R>, adjoint<4, R>, adjoint<5, R>},
};

}  // namespace

extern const Table table{kernels<float>, kernels<double>};

}  // namespace fastmeta::adaptive_update::FASTMETA_ISA
