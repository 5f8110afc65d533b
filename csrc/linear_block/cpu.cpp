#ifndef FASTMETA_ISA
#define FASTMETA_ISA plain
#endif

#include "gram.h"
#include "layer.h"

// The weight is packed as its transposed, [in, padded(out)]: forward and the weight's gradient then run along rows of
// whole vectors. Only the input's cotangent wants it the other way round, and has it transposed when it comes to that.
// A narrow layer, whose rows would be padding for the most part, has it as [out, padded(in)]: its forward takes dot
// products, and nothing is transposed. A large weight is copied in panels, one way or the other (common/panels.h).

namespace fastmeta::linear_block::FASTMETA_ISA {
namespace {

template <class R>
Sizes sizes(const void* shape) {
  const Layout<R> l(shape);
  const std::int64_t rows = l.s.n * l.out;
  Sizes sizes{};
  sizes.y = rows;
  sizes.rereads_y = !l.identity();
  sizes.saved = l.behind_dz() + (l.turns() ? l.s.out * l.in : 0);
  sizes.saved_dot = l.behind_z_dots() + (l.turns() ? l.s.out * l.in : 0);
  sizes.scratch = l.identity() ? 0 : rows;  // dz_dot
  sizes.thread_scratch = l.large() ? copies_size<R>(l.s.in, l.s.n) : 0;  // the weight's gradient copies x
  sizes.weights[0] = l.narrow() ? l.s.out * l.in : l.s.in * l.out;
  sizes.weights[1] = l.s.bias ? l.out : 0;
  sizes.turned = l.turns() ? l.s.out * l.in : 0;
  return sizes;
}

template <class R>
void turn(const void* shape, const R* packed, R* turned) {
  const Layout<R> l(shape);
  transpose(packed, l.out, l.s.in, l.s.out, turned);
}

// Memory of a map, and the threads that share it.
template <class R>
struct Room {
  int threads;
  R* panels;

  Room(const Layout<R>& l, const Primal<R>& p, R* scratch)
      : threads(p.threads), panels(scratch + (l.identity() ? 0 : l.s.n * l.out)) {}
};

// A sum of products; of large factors by panels.
template <class R, bool turned>
void multiply(const Layout<R>& l, const Term<R>* terms, int count, std::int64_t rows, std::int64_t columns,
              const Result<R>& result, const Room<R>& room) {
  if (l.large() && turned)
    turned_panel_product(terms, count, rows, columns, result, room.threads, room.panels);
  else if (l.large())
    panel_product(terms, count, rows, columns, result, room.threads, room.panels);
  else
    product_of<R, turned>(terms, count, rows, columns, result);
}

// out [n, padded(out)] = base + sum of a W^T.
template <class R>
void to_outputs(const Layout<R>& l, const Term<R>* terms, int count, const R* base, R* out, const Room<R>& room) {
  if (l.narrow()) return dot_products(terms, count, l.n, l.s.out, base, out);
  multiply<R, false>(l, terms, count, l.n, l.s.out, Result<R>{out, l.out, base}, room);
}

// A term of the weight's gradient: the outer products of the rows of dz and x.
template <class R>
Term<R> outer_products(const Layout<R>& l, const R* x, std::int64_t x_row, const R* dz) {
  if (l.narrow()) return {dz, l.out, x, l.in, l.n};
  return {x, x_row, dz, l.out, l.n};
}

template <class R>
void to_weight(const Layout<R>& l, const Term<R>* terms, int count, const Step<R>& step, R* dw,
               const Room<R>& room) {
  const std::int64_t rows = l.narrow() ? l.s.out : l.s.in, columns = l.narrow() ? l.s.in : l.s.out;
  const R rate = step.from[0] != nullptr ? *step.rate[0] : R(0);
  multiply<R, true>(l, terms, count, rows, columns, Result<R>{dw, l.weight_row(), nullptr, step.from[0], rate}, room);
}

// A term of the input's cotangent: dz W. Where W has to be transposed for that as a whole, it is put at `place`.
template <class R>
Term<R> to_input(const Layout<R>& l, const R* dz, const R* weight, R* place) {
  if (l.large()) return {dz, l.out, weight, l.out, l.s.out, true};
  if (l.turns()) {
    transpose(weight, l.out, l.s.in, l.s.out, place);
    weight = place;
  }
  return {dz, l.out, weight, l.in, l.s.out};
}

template <class R>
void forward(const void* shape, const Primal<R>& p, R* scratch) {
  const Layout<R> l(shape, p.target);
  const Term<R> term{p.x[0], l.x_row, p.w[0], l.weight_row(), l.s.in};
  to_outputs(l, &term, 1, l.s.bias ? p.w[1] : nullptr, p.y, Room<R>(l, p, scratch));
  activate(l, p);
}

template <class R>
void backward(const void* shape, const Primal<R>& p, R* scratch) {
  const Layout<R> l(shape, p.target);
  const Room<R> room(l, p, scratch);
  descend(l, p);
  const R* dz = l.dz_of(p);
  if (p.dx[0] != nullptr) {
    Term<R> term{dz, l.out, p.turned, l.in, l.s.out};
    if (p.turned == nullptr) term = to_input(l, dz, p.w[0], p.saved + l.behind_dz());
    multiply<R, false>(l, &term, 1, l.n, l.s.in, Result<R>{p.dx[0], l.in}, room);
  }
  if (p.dw[0] != nullptr) {  // where the weight lies, perhaps
    const Term<R> term = outer_products(l, p.x[0], l.x_row, dz);
    to_weight(l, &term, 1, p.step, p.dw[0], room);
  }
  if (p.dw[1] != nullptr) to_bias(l, dz, p.step, p.dw[1]);
}

template <class R>
void tangent(const void* shape, const Primal<R>& p, const Tangent<R>& t, R* scratch) {
  const Layout<R> l(shape, p.target);
  Term<R> terms[2];
  int count = 0;
  if (t.x_dot[0] != nullptr) terms[count++] = {t.x_dot[0], l.in, p.w[0], l.weight_row(), l.s.in};
  if (t.w_dot[0] != nullptr) terms[count++] = {p.x[0], l.x_row, t.w_dot[0], l.weight_row(), l.s.in};
  to_outputs(l, terms, count, l.s.bias ? t.w_dot[1] : nullptr, t.y_dot, Room<R>(l, p, scratch));
  activate_tangent(l, p, t);
}

template <class R>
void tangent_backward(const void* shape, const Primal<R>& p, const Tangent<R>& t, R* scratch) {
  const Layout<R> l(shape, p.target);
  const Room<R> room(l, p, scratch);
  const R* dz = l.dz_of(p);
  const R* dz_dot = descend_tangent(l, p, t, scratch);
  if (t.dx_dot[0] != nullptr) {
    Term<R> terms[2];
    int count = 0;
    if (l.turns())  // backward has left it
      terms[count++] = {dz_dot, l.out, p.turned != nullptr ? p.turned : p.saved + l.behind_dz(), l.in, l.s.out};
    else
      terms[count++] = to_input<R>(l, dz_dot, p.w[0], nullptr);
    if (t.w_dot[0] != nullptr) terms[count++] = to_input(l, dz, t.w_dot[0], t.saved_dot + l.behind_z_dots());
    multiply<R, false>(l, terms, count, l.n, l.s.in, Result<R>{t.dx_dot[0], l.in}, room);
  }
  if (t.dw_dot[0] != nullptr) {  // where the direction lies, perhaps
    Term<R> terms[2];
    int count = 0;
    terms[count++] = outer_products(l, p.x[0], l.x_row, dz_dot);
    if (t.x_dot[0] != nullptr) terms[count++] = outer_products(l, t.x_dot[0], l.in, dz);
    to_weight(l, terms, count, t.step, t.dw_dot[0], room);
  }
  if (t.dw_dot[1] != nullptr) to_bias(l, dz_dot, t.step, t.dw_dot[1]);
}

template <class R>
constexpr executor::Maps<R> maps{width<R>,    sizes<R>,   pack<R>,             unpack<R>, forward<R>,
                                 backward<R>, tangent<R>, tangent_backward<R>, turn<R>, true};

}  // namespace

extern const Table table{maps<float>, maps<double>, gram::maps<float>, gram::maps<double>};

}  // namespace fastmeta::linear_block::FASTMETA_ISA
