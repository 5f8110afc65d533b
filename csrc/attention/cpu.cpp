#include <limits>

#include "../common/kept_rows.h"
#include "../common/product.h"
#include "../common/threads.h"
#include "../common/transpose.h"
#include "../common/vectors.h"
#include "kernels.h"

#ifndef FASTMETA_ISA
#define FASTMETA_ISA plain
#endif

// With P = softmax(S), S = scale Q K^T + M, O = P V of one head, and <., .> a sum over columns of a row:
//
//   backward           dV = P^T dO,  dP = dO V^T,  E = dP - <P, dP>,  dS = scale P E,  dQ = dS K,  dK = dS^T Q
//   tangent            S' = scale (Q' K^T + Q K'^T),  P' = P (S' - <P, S'>),  O' = P' V + P V'
//   tangent_backward   dV' = P'^T dO + P^T dO',  dP' = dO' V^T + dO V'^T,
//                      dS' = scale (P' E + P (dP' - <P', dP> - <P, dP'>)),
//                      dQ' = dS' K + dS K',  dK' = dS'^T Q + dS^T Q'
//
// P and P' are kept; the products with V^T are made again. Heads are spread over threads, and each writes its own
// columns. Heads of whole vectors are read and written where they lie; others are copied on their way.
// Of a sample's rows that are kept alone there are as many scores as these make, in the first part of the place for all.

namespace fastmeta::attention::FASTMETA_ISA {
namespace {

using executor::Primal;
using executor::Sizes;
using executor::Tangent;

template <class R>
struct Layout {
  const Shape& s;
  const void* kept;                // the list; null where all rows are
  std::int64_t row, dim, columns;  // padded: of values; of a head; of scores

  explicit Layout(const void* shape, const void* list = nullptr)
      : s(*static_cast<const Shape*>(shape)),
        kept(list),
        row(padded<R>(s.heads * s.dim)),
        dim(padded<R>(s.dim)),
        columns(padded<R>(s.columns)) {}

  bool in_place() const { return dim == s.dim; }
  std::int64_t queries() const { return s.rows * dim; }  // elements of a head
  std::int64_t keys() const { return s.columns * dim; }
  std::int64_t scores() const { return s.rows * columns; }
  std::int64_t turned() const { return s.dim * columns; }  // of keys or values, [dim, columns]
  std::int64_t scratch() const { return 5 * queries() + 5 * keys() + 4 * turned() + 4 * scores(); }
};

template <class R>
Sizes sizes(const void* shape) {
  const Layout<R> l(shape);
  Sizes sizes{};
  sizes.y = l.s.n * l.s.rows * l.row;
  sizes.saved = sizes.saved_dot = l.s.n * l.s.heads * l.scores();
  sizes.thread_scratch = l.scratch();
  sizes.rereads_y = false;
  return sizes;
}

// One head of one sample, and a thread's memory, from which it takes what it needs.
template <class R>
class Head {
 public:
  Head(const Layout<R>& l, std::int64_t number, R* scratch)
      : l_(l),
        number_(number),
        sample_(number / l.s.heads),
        head_(number % l.s.heads),
        row_(l.in_place() ? l.row : l.dim),
        rows_(l.s.rows),
        columns_(l.s.columns),
        first_query_(sample_ * rows_),
        first_key_(sample_ * columns_),
        free_(scratch) {
    if (l.kept != nullptr) {
      const KeptRows list(l.kept, l.s.n);
      first_query_ = first_key_ = list.before(sample_);
      rows_ = columns_ = list.before(sample_ + 1) - first_query_;
    }
    score_row_ = padded<R>(columns_);
  }

  std::int64_t rows() const { return rows_; }
  std::int64_t score_row() const { return score_row_; }

  R* take(std::int64_t elements) {
    R* const place = free_;
    free_ += elements;
    return place;
  }

  // The head's part of the sample's rows of values, `row` elements apart; null where there are none.
  const R* rows_of(const R* values, std::int64_t first, std::int64_t rows) {
    if (values == nullptr) return nullptr;
    const R* in = values + first * l_.row + head_ * l_.s.dim;
    if (l_.in_place()) return in;
    R* const out = take(rows * l_.dim);
    for (std::int64_t i = 0; i < rows; ++i, in += l_.row)
      for (std::int64_t j = 0; j < l_.dim; ++j) out[i * l_.dim + j] = j < l_.s.dim ? in[j] : R(0);
    return out;
  }
  const R* queries_of(const R* values) { return rows_of(values, first_query_, rows_); }
  const R* keys_of(const R* values) { return rows_of(values, first_key_, columns_); }

  // Keys or values as [dim, columns].
  const R* turned(const R* keys) {
    if (keys == nullptr) return nullptr;
    R* const out = take(l_.turned());
    transpose(keys, row_, columns_, l_.s.dim, out);
    return out;
  }

  // The head's part of kept scores.
  R* scores_in(R* kept) const { return kept + number_ * l_.scores(); }
  const R* scores_in(const R* kept) const { return kept + number_ * l_.scores(); }

  // c [rows, columns] = the sum of a b, with a [rows, dim] and b [dim, columns]; terms without a factor are left out.
  void to_scores(const R* a0, const R* b0, const R* a1, const R* b1, R* c) const {
    Term<R> terms[2];
    int count = 0;
    if (a0 != nullptr && b0 != nullptr) terms[count++] = {a0, row_, b0, score_row_, l_.s.dim};
    if (a1 != nullptr && b1 != nullptr) terms[count++] = {a1, row_, b1, score_row_, l_.s.dim};
    product(terms, count, rows_, columns_, Result<R>{c, score_row_});
  }

  // The sum of a b, with a [rows, columns] and b [columns, dim], to the head's columns of y.
  void to_queries(const R* a0, const R* b0, const R* a1, const R* b1, R* y) {
    put<false>(a0, b0, a1, b1, rows_, columns_, first_query_, y);
  }
  // The sum of a^T b, with a [rows, columns] and b [rows, dim].
  void to_keys(const R* a0, const R* b0, const R* a1, const R* b1, R* y) {
    put<true>(a0, b0, a1, b1, columns_, rows_, first_key_, y);
  }

  // P of S, in its place.
  void softmax(const R* mask, R* scores) const {
    const R scale = static_cast<R>(l_.s.scale);
    for (std::int64_t i = 0; i < rows_; ++i) {
      R* row = scores + i * score_row_;
      for (std::int64_t j = 0; j < score_row_; j += width<R>) store(row + j, scale * load(row + j));
      add_mask(mask, i, row);
      Vector<R> most = splat<R>(row[0]);
      for (std::int64_t j = 0; j < score_row_; j += width<R>) {
        const Vector<R> here = load(row + j);
        most = select<R>(present(j) & (here > most), here, most);
      }
      most = largest_everywhere<R>(most);
      if (l_.s.safe && most[0] == closed) {
        for (std::int64_t j = 0; j < score_row_; j += width<R>) store(row + j, Vector<R>{});
        continue;
      }
      Vector<R> sums{};
      for (std::int64_t j = 0; j < score_row_; j += width<R>) {
        const Vector<R> e = select<R>(present(j), exponential(load(row + j) - most), Vector<R>{});
        store(row + j, e);
        sums += e;
      }
      const Vector<R> total = sum_everywhere<R>(sums);
      for (std::int64_t j = 0; j < score_row_; j += width<R>) store(row + j, load(row + j) / total);
    }
  }

  // <a, b> of a row, in every lane.
  Vector<R> dot(const R* a, const R* b, std::int64_t row) const {
    Vector<R> sums{};
    for (std::int64_t j = row * score_row_; j < (row + 1) * score_row_; j += width<R>) sums += load(a + j) * load(b + j);
    return sum_everywhere<R>(sums);
  }

  // out = factor p (v - <p, v>): the derivative of softmax applied to v, its own transpose.
  void derivative(const R* p, const R* v, R factor, R* out) const {
    for (std::int64_t i = 0; i < rows_; ++i) {
      const Vector<R> mean = dot(p, v, i);
      for (std::int64_t j = i * score_row_; j < (i + 1) * score_row_; j += width<R>)
        store(out + j, factor * load(p + j) * (load(v + j) - mean));
    }
  }

 private:
  // Which lanes of a row of scores, from j on, are no padding.
  FASTMETA_INLINE Mask<R> present(std::int64_t j) const {
    return lanes_from<R>(j) < splat_mask<R>(static_cast<int>(columns_));
  }

  static constexpr R closed = -std::numeric_limits<R>::infinity();

  // What the mask adds to the scores of query i, or which of them it closes.
  void add_mask(const R* mask, std::int64_t i, R* row) const {
    const std::int64_t* step = l_.s.mask;
    const std::int64_t from = sample_ * step[0] + head_ * step[1] + place(i) * step[2];
    if (l_.s.masked && l_.s.boolean) {
      const char* open = reinterpret_cast<const char*>(mask) + from;
      for (std::int64_t j = 0; j < columns_; ++j)
        if (open[place(j) * step[3]] == 0) row[j] = closed;
    } else if (l_.s.masked) {
      for (std::int64_t j = 0; j < columns_; ++j) row[j] += mask[from + place(j) * step[3]];
    }
    for (std::int64_t j = 0; l_.s.causal && j < columns_; ++j)
      if (place(j) > place(i)) row[j] = closed;
  }

  // Where among all rows of the sample the i-th of those at work is.
  std::int64_t place(std::int64_t i) const {
    return l_.kept == nullptr ? i : KeptRows(l_.kept, l_.s.n).row(first_query_ + i) - sample_ * l_.s.rows;
  }

  template <bool transposed>
  void put(const R* a0, const R* b0, const R* a1, const R* b1, std::int64_t rows, std::int64_t depth,
           std::int64_t first, R* y) {
    if (y == nullptr) return;
    Term<R> terms[2];
    int count = 0;
    if (a0 != nullptr && b0 != nullptr) terms[count++] = {a0, score_row_, b0, row_, depth};
    if (a1 != nullptr && b1 != nullptr) terms[count++] = {a1, score_row_, b1, row_, depth};
    R* out = y + first * l_.row + head_ * l_.s.dim;
    if (l_.in_place()) return product_of<R, transposed>(terms, count, rows, l_.s.dim, Result<R>{out, l_.row});
    R* const block = free_;  // behind all that is taken
    product_of<R, transposed>(terms, count, rows, l_.s.dim, Result<R>{block, l_.dim});
    const std::int64_t behind = head_ == l_.s.heads - 1 ? l_.row - l_.s.heads * l_.s.dim : 0;  // padding
    for (std::int64_t i = 0; i < rows; ++i, out += l_.row) {
      for (std::int64_t j = 0; j < l_.s.dim; ++j) out[j] = block[i * l_.dim + j];
      for (std::int64_t j = 0; j < behind; ++j) out[l_.s.dim + j] = 0;
    }
  }

  const Layout<R>& l_;
  const std::int64_t number_, sample_, head_, row_;
  std::int64_t rows_, columns_, score_row_;  // of scores: those at work, and elements of a row
  std::int64_t first_query_, first_key_;     // of the sample, among rows of values
  R* free_;
};

template <class R, class F>
void for_heads(const Layout<R>& l, int threads, R* scratch, F f) {
  parallel_for(l.s.n * l.s.heads, threads, [&](std::int64_t first, std::int64_t last, int seat) {
    for (std::int64_t i = first; i < last; ++i) {
      Head<R> head(l, i, scratch + seat * l.scratch());
      f(head);
    }
  });
}

template <class R>
void forward(const void* shape, const Primal<R>& p, R* scratch) {
  const Layout<R> l(shape, p.target);
  for_heads<R>(l, p.threads, scratch, [&](Head<R>& head) {
    const R *q = head.queries_of(p.x[0]), *k = head.keys_of(p.x[1]), *v = head.keys_of(p.x[2]);
    R* scores = head.scores_in(p.saved);
    head.to_scores(q, head.turned(k), nullptr, nullptr, scores);
    head.softmax(p.x[3], scores);
    head.to_queries(scores, v, nullptr, nullptr, p.y);
  });
}

template <class R>
void backward(const void* shape, const Primal<R>& p, R* scratch) {
  const Layout<R> l(shape, p.target);
  for_heads<R>(l, p.threads, scratch, [&](Head<R>& head) {
    const R *q = head.queries_of(p.x[0]), *k = head.keys_of(p.x[1]), *v = head.keys_of(p.x[2]);
    const R *d = head.queries_of(p.dy), *probabilities = head.scores_in(p.saved);
    R* ds = head.take(l.scores());
    head.to_scores(d, head.turned(v), nullptr, nullptr, ds);
    head.derivative(probabilities, ds, static_cast<R>(l.s.scale), ds);
    head.to_queries(ds, k, nullptr, nullptr, p.dx[0]);
    head.to_keys(ds, q, nullptr, nullptr, p.dx[1]);
    head.to_keys(probabilities, d, nullptr, nullptr, p.dx[2]);
  });
}

template <class R>
void tangent(const void* shape, const Primal<R>& p, const Tangent<R>& t, R* scratch) {
  const Layout<R> l(shape, p.target);
  for_heads<R>(l, p.threads, scratch, [&](Head<R>& head) {
    const R *q = head.queries_of(p.x[0]), *k = head.keys_of(p.x[1]), *v = head.keys_of(p.x[2]);
    const R *q_dot = head.queries_of(t.x_dot[0]), *k_dot = head.keys_of(t.x_dot[1]), *v_dot = head.keys_of(t.x_dot[2]);
    const R* probabilities = head.scores_in(p.saved);
    R* dots = head.scores_in(t.saved_dot);
    head.to_scores(q_dot, head.turned(k), q, head.turned(k_dot), dots);
    head.derivative(probabilities, dots, static_cast<R>(l.s.scale), dots);
    head.to_queries(dots, v, probabilities, v_dot, t.y_dot);
  });
}

template <class R>
void tangent_backward(const void* shape, const Primal<R>& p, const Tangent<R>& t, R* scratch) {
  const Layout<R> l(shape, p.target);
  const R scale = static_cast<R>(l.s.scale);
  for_heads<R>(l, p.threads, scratch, [&](Head<R>& head) {
    const R *q = head.queries_of(p.x[0]), *k = head.keys_of(p.x[1]), *v = head.keys_of(p.x[2]);
    const R *q_dot = head.queries_of(t.x_dot[0]), *k_dot = head.keys_of(t.x_dot[1]), *v_dot = head.keys_of(t.x_dot[2]);
    const R *d = head.queries_of(p.dy), *d_dot = head.queries_of(t.dy_dot);
    const R *probabilities = head.scores_in(p.saved), *dots = head.scores_in(t.saved_dot);
    const R* turned = head.turned(v);
    R *dp = head.take(l.scores()), *ds = head.take(l.scores()), *ds_dot = head.take(l.scores());
    head.to_scores(d, turned, nullptr, nullptr, dp);
    head.derivative(probabilities, dp, scale, ds);
    head.to_scores(d_dot, turned, d, head.turned(v_dot), ds_dot);
    for (std::int64_t i = 0; i < head.rows(); ++i) {
      const Vector<R> mean = head.dot(probabilities, dp, i);
      const Vector<R> mean_dot = head.dot(dots, dp, i) + head.dot(probabilities, ds_dot, i);
      for (std::int64_t j = i * head.score_row(); j < (i + 1) * head.score_row(); j += width<R>) {
        const Vector<R> bent = load(dots + j) * (load(dp + j) - mean);
        store(ds_dot + j, scale * (bent + load(probabilities + j) * (load(ds_dot + j) - mean_dot)));
      }
    }
    head.to_queries(ds_dot, k, ds, k_dot, t.dx_dot[0]);
    head.to_keys(ds_dot, q, ds, q_dot, t.dx_dot[1]);
    head.to_keys(probabilities, d_dot, dots, d, t.dx_dot[2]);
  });
}

template <class R>
constexpr executor::Maps<R> maps{width<R>,   sizes<R>,    nullptr,    nullptr,
                                 forward<R>, backward<R>, tangent<R>, tangent_backward<R>};

}  // namespace

extern const Table table{maps<float>, maps<double>};

}  // namespace fastmeta::attention::FASTMETA_ISA
