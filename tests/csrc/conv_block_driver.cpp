// Checks the four maps of the convolutional block against plain loops over dual numbers, on random shapes.
//
// The plain loops' own backward is checked by <dy, y_dot> = <dx, x_dot> + <dw, w_dot>. Arguments: [shapes] [seed].
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "plain_conv_block.h"

#ifndef FASTMETA_ISA
#define FASTMETA_ISA plain
#endif

namespace {

// Memory of exactly the size asked for, at a multiple of 64 bytes, full of NaN.
template <class R>
struct Buffer {
  R* p = nullptr;
  int64_t n;
  explicit Buffer(int64_t size) : n(size) {
    void* memory = nullptr;
    if (posix_memalign(&memory, 64, std::max<size_t>(1, size * sizeof(R))) != 0) std::abort();
    p = static_cast<R*>(memory);
    std::fill(p, p + n, std::numeric_limits<R>::quiet_NaN());
  }
  Buffer(const Buffer&) = delete;
  ~Buffer() { std::free(p); }
};

int failures = 0;

std::string describe(const Shape& s) {
  char text[400];
  std::snprintf(text, sizeof text,
                "n %ld in %ld out %ld image %ldx%ld kernel %ldx%ld stride %ld,%ld pad %ld,%ld dilation %ld,%ld "
                "groups %ld norm %d activation %d pool %d (%ldx%ld stride %ld,%ld pad %ld,%ld) bias %d affine %d "
                "data %d",
                s.n, s.in, s.out, s.height, s.width, s.kernel[0], s.kernel[1], s.stride[0], s.stride[1], s.padding[0],
                s.padding[1], s.dilation[0], s.dilation[1], s.groups, int(s.norm), int(s.activation), int(s.pool.kind),
                s.pool.kernel[0], s.pool.kernel[1], s.pool.stride[0], s.pool.stride[1], s.pool.padding[0],
                s.pool.padding[1], s.bias, s.affine, s.data);
  return text;
}

// The largest difference, relative to the largest of what is expected, or to the one unit all values are drawn in: what
// cancels to less has the rounding of its terms.
template <class R>
double difference(const R* got, const Tensor<double>& expected) {
  double worst = 0, scale = 1;
  for (size_t i = 0; i < expected.size(); ++i) {
    const double d = std::fabs(double(got[i]) - expected[i]);
    if (!(d <= worst)) worst = d;  // NaN stays
    scale = std::max(scale, std::fabs(expected[i]));
  }
  return worst / scale;
}

// Images [n, c, h, w] to and from [n, h, w, padded c].
struct Images {
  int64_t n, c, h, w, padded;

  template <class R>
  void spread(const Tensor<double>& from, R* to) const {
    std::fill(to, to + n * h * w * padded, R(0));
    for (int64_t i = 0; i < n; ++i)
      for (int64_t k = 0; k < c; ++k)
        for (int64_t p = 0; p < h * w; ++p) to[(i * h * w + p) * padded + k] = R(from[(i * c + k) * h * w + p]);
  }
  template <class R>
  bool gather(const R* from, Tensor<R>& to) const {
    to.resize(n * c * h * w);
    bool clean = true;
    for (int64_t i = 0; i < n; ++i)
      for (int64_t p = 0; p < h * w; ++p)
        for (int64_t k = 0; k < padded; ++k) {
          const R v = from[(i * h * w + p) * padded + k];
          if (k < c) {
            to[(i * c + k) * h * w + p] = v;
          } else {
            clean = clean && v == 0;
          }
        }
    return clean;
  }
};

Tensor<double> parts(const Tensor<Dual>& t, bool dot) {
  Tensor<double> out;
  for (const Dual& v : t) out.push_back(dot ? v.d : v.v);
  return out;
}

struct Wanted {
  bool dx = true, dw[4] = {true, true, true, true}, x_dot = true, w_dot[4] = {true, true, true, true}, tangent = true;
};

template <class R>
class Check {
 public:
  Check(const executor::Maps<R>& maps, const Shape& s, const Plain<Dual>& expected, const Wanted& wanted,
        double tolerance)
      : maps_(maps), s_(s), e_(expected), wanted_(wanted), tolerance_(tolerance) {}

  double worst = 0;

  void run() {
    const executor::Sizes z = maps_.sizes(&s_);
    const int64_t v = maps_.width;
    const Images in{s_.n, s_.in, s_.height, s_.width, (s_.in + v - 1) / v * v};
    const Images out{s_.n, s_.out, e_.ph, e_.pw, (s_.out + v - 1) / v * v};
    const int64_t x_size = s_.data ? s_.n * s_.in * s_.height * s_.width : in.n * in.h * in.w * in.padded;
    Buffer<R> x(x_size), x_dot(x_size), dx(x_size), dx_dot(x_size), y(z.y), y_dot(z.y), dy(z.y), dy_dot(z.y);
    Buffer<R> saved(z.saved), saved_dot(z.saved_dot);
    if (z.y != out.n * out.h * out.w * out.padded) fail("size of y", 1);
    const bool moves = wanted_.x_dot && !s_.data;
    if (s_.data) {
      for (int64_t i = 0; i < x_size; ++i) x.p[i] = R(e_.x[i].v);
    } else {
      in.spread(parts(e_.x, false), x.p);
      in.spread(parts(e_.x, true), x_dot.p);
    }
    out.spread(parts(e_.dy, false), dy.p);
    out.spread(parts(e_.dy, true), dy_dot.p);

    executor::Primal<R> p{};
    executor::Tangent<R> t{};
    std::vector<Buffer<R>*> owned;
    const auto buffer = [&](int64_t size) {
      owned.push_back(new Buffer<R>(size));
      return owned.back()->p;
    };
    for (int i = 0; i < 6; ++i) {
      if ((z.weights[i] > 0) != !e_.w[i].empty()) fail("weight sizes", 1);
      if (e_.w[i].empty()) continue;
      p.w[i] = packed(i, parts(e_.w[i], false), buffer(z.weights[i]));
      if (i > 3) continue;
      if (wanted_.w_dot[i]) t.w_dot[i] = packed(i, parts(e_.w[i], true), buffer(z.weights[i]));
      if (wanted_.dw[i]) {
        p.dw[i] = buffer(z.weights[i]);
        t.dw_dot[i] = buffer(z.weights[i]);
      }
    }
    p.x[0] = x.p;
    p.y = y.p;
    p.saved = saved.p;
    p.dy = dy.p;
    if (wanted_.dx && !s_.data) {
      p.dx[0] = dx.p;
      t.dx_dot[0] = dx_dot.p;
    }
    t.x_dot[0] = moves ? x_dot.p : nullptr;
    t.y_dot = y_dot.p;
    t.saved_dot = saved_dot.p;
    t.dy_dot = dy_dot.p;

    // All four maps; everything they wrote.
    const auto run_maps = [&](int threads) {
      const int64_t scratch = z.scratch + threads * z.thread_scratch;
      p.threads = threads;
      maps_.forward(&s_, p, Buffer<R>(scratch).p);
      maps_.backward(&s_, p, Buffer<R>(scratch).p);
      if (wanted_.tangent) {
        maps_.tangent(&s_, p, t, Buffer<R>(scratch).p);
      } else {
        std::fill(saved_dot.p, saved_dot.p + saved_dot.n, R(0));
      }
      maps_.tangent_backward(&s_, p, t, Buffer<R>(scratch).p);
      std::vector<R> all(y.p, y.p + y.n);
      const auto add = [&](const R* from, int64_t n) { all.insert(all.end(), from, from + n); };
      if (wanted_.tangent) add(y_dot.p, y_dot.n);
      if (p.dx[0] != nullptr) {
        add(dx.p, dx.n);
        add(dx_dot.p, dx_dot.n);
      }
      for (int i = 0; i < 4; ++i)
        if (p.dw[i] != nullptr) {
          add(p.dw[i], z.weights[i]);
          add(t.dw_dot[i], z.weights[i]);
        }
      return all;
    };
    const auto alone = run_maps(1);
    for (const int threads : {2, 5})
      if (const auto together = run_maps(threads);
          std::memcmp(alone.data(), together.data(), alone.size() * sizeof(R)) != 0)
        fail("other bits from other threads", 1);

    compare_image("y", out, y.p, parts(e_.y, false));
    if (p.dx[0] != nullptr) compare_image("dx", in, dx.p, parts(e_.dx, false));
    for (int i = 0; i < 4; ++i)
      if (p.dw[i] != nullptr) compare_weight("dw", i, z.weights[i], p.dw[i], parts(e_.dw[i], false));
    if (wanted_.tangent) compare_image("y_dot", out, y_dot.p, parts(e_.y, true));
    if (p.dx[0] != nullptr) compare_image("dx_dot", in, dx_dot.p, parts(e_.dx, true));
    for (int i = 0; i < 4; ++i)
      if (p.dw[i] != nullptr) compare_weight("dw_dot", i, z.weights[i], t.dw_dot[i], parts(e_.dw[i], true));
    for (Buffer<R>* b : owned) delete b;
  }

 private:
  R* packed(int which, const Tensor<double>& tensor, R* memory) {
    const Tensor<R> plain(tensor.begin(), tensor.end());
    maps_.pack(&s_, which, plain.data(), memory);
    return memory;
  }
  void compare_image(const char* name, const Images& layout, const R* got, const Tensor<double>& expected) {
    Tensor<R> gathered;
    if (!layout.gather(got, gathered)) fail((std::string(name) + ": padding").c_str(), 1);
    judge(name, difference(gathered.data(), expected));
  }
  // Unpacked; packing again must give the same, which says that padding is zero and no element is lost.
  void compare_weight(const char* name, int which, int64_t size, const R* got, const Tensor<double>& expected) {
    Tensor<R> tensor(expected.size());
    maps_.unpack(&s_, which, got, tensor.data());
    Buffer<R> again(size);
    maps_.pack(&s_, which, tensor.data(), again.p);
    const std::string label = std::string(name) + "[" + std::to_string(which) + "]";
    if (!std::equal(got, got + size, again.p)) fail((label + ": padding").c_str(), 1);
    judge(label.c_str(), difference(tensor.data(), expected));
  }
  void judge(const char* name, double d) {
    if (!(d <= worst)) worst = d;
    if (!(d <= tolerance_)) fail(name, d);
  }
  void fail(const char* name, double d) {
    ++failures;
    std::printf("FAIL %s %s: %.3g\n     %s\n", sizeof(R) == 4 ? "float32" : "float64", name, d, describe(s_).c_str());
  }

  const executor::Maps<R>& maps_;
  const Shape& s_;
  const Plain<Dual>& e_;
  const Wanted& wanted_;
  double tolerance_;
};

class Random {
 public:
  explicit Random(unsigned seed) : engine_(seed) {}
  int64_t among(int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(engine_); }
  bool chance(double p) { return std::uniform_real_distribution<>(0, 1)(engine_) < p; }
  Tensor<Dual> tensor(int64_t n, double scale, double centre, bool moves) {
    std::normal_distribution<> normal;
    Tensor<Dual> t;
    for (int64_t i = 0; i < n; ++i) {
      const double v = float(centre + scale * normal(engine_)), d = float(scale * normal(engine_));
      t.push_back({v, moves ? d : 0});  // values that both types hold
    }
    return t;
  }

  // Half of them the usual block, half anything; a few so large that one image has work for several threads.
  Shape shape() {
    Shape s{};
    s.n = among(1, 5);
    s.out = chance(.3) ? among(1, 5) : among(1, 40);
    s.data = chance(.4);
    s.in = s.data ? (chance(.7) ? (chance(.5) ? 1 : 3) : among(1, 6)) : among(1, 40);
    const bool large = chance(.05);
    if (large) s.in = among(1, 3);
    if (large) s.out = among(1, 3);
    s.height = large ? among(40, 60) : among(1, 15);
    s.width = large ? 60 : chance(.5) ? s.height : among(1, 15);
    s.groups = 1;
    s.eps = 1e-5;
    s.slope = 0.1;
    s.norm = Norm::batch;
    s.activation = Activation::relu;
    s.pool.kind = Pool::max;
    s.affine = true;
    s.bias = chance(.5);
    for (int i = 0; i < 2; ++i) {
      s.kernel[i] = 3;
      s.stride[i] = s.padding[i] = s.dilation[i] = 1;
      s.pool.kernel[i] = s.pool.stride[i] = 2;
      if (chance(.1)) s.padding[i] = among(0, 2);
    }
    if (chance(.5)) return s;
    const int64_t kernels[] = {1, 2, 3, 5};
    s.norm = Norm(chance(.5) ? 1 : among(0, 2));
    s.activation = Activation(chance(.5) ? among(0, 2) : among(3, 6));
    s.pool.kind = Pool(among(0, 2));
    s.affine = s.norm != Norm::none && chance(.7);
    const bool usual = chance(.4), usual_pool = chance(.5);
    for (int i = 0; i < 2; ++i) {
      if (!usual) {
        s.kernel[i] = kernels[among(0, 3)];
        s.stride[i] = among(1, 3);
        s.padding[i] = among(0, 3);
        s.dilation[i] = chance(.7) ? 1 : 2;
      }
      if (!usual_pool) {
        s.pool.kernel[i] = among(1, 4);
        s.pool.stride[i] = among(1, 3);
        s.pool.padding[i] = among(0, s.pool.kernel[i] / 2);
      }
    }
    if (chance(.25)) {  // few, or so many that the convolution is cut into slices
      const bool many = chance(.5);
      s.groups = many ? among(20, 70) : among(2, 3);
      s.in = s.groups * among(1, many ? 2 : 8);
      s.out = s.groups * among(1, many ? 2 : 8);
    }
    return s;
  }

  Wanted wanted() {
    Wanted w;
    if (chance(.6)) return w;
    w.dx = chance(.7);
    w.x_dot = chance(.7);
    w.tangent = chance(.9);
    for (int i = 0; i < 4; ++i) {
      w.dw[i] = chance(.7);
      w.w_dot[i] = chance(.7) && w.tangent;
    }
    w.x_dot = w.x_dot && w.tangent;
    return w;
  }

 private:
  std::mt19937 engine_;
};

double inner(const Tensor<Dual>& cotangent, const Tensor<Dual>& tangent) {
  double total = 0;
  for (size_t i = 0; i < tangent.size(); ++i) total += cotangent[i].v * tangent[i].d;
  return total;
}

// No decision so close to its edge that rounding could turn it, no channel that its norm blows up.
bool well_conditioned(const Plain<Dual>& e) {
  for (const Dual& inverse : e.inverse)
    if (inverse.v > 5) return false;
  return e.margin > 1e-5;
}

// Draws values until single precision can be asked for the same answers.
bool draw(Random& random, const Wanted& wanted, Plain<Dual>& e) {
  const Shape& s = e.s;
  const double scale = 1 / std::sqrt(double(s.in / s.groups * s.kernel[0] * s.kernel[1]));
  for (int tries = 0; tries < 20; ++tries) {
    e.margin = std::numeric_limits<double>::infinity();
    e.x = random.tensor(s.n * s.in * s.height * s.width, 1, .3, wanted.x_dot && !s.data);
    e.w[0] = random.tensor(s.out * s.in / s.groups * s.kernel[0] * s.kernel[1], scale, 0, wanted.w_dot[0]);
    if (s.bias) e.w[1] = random.tensor(s.out, .3, 0, wanted.w_dot[1]);
    if (s.affine) {
      e.w[2] = random.tensor(s.out, .3, 1, wanted.w_dot[2]);
      e.w[3] = random.tensor(s.out, .3, 0, wanted.w_dot[3]);
    }
    if (s.norm == Norm::running) {
      e.w[4] = random.tensor(s.out, .3, 0, false);
      e.w[5] = random.tensor(s.out, .1, 1, false);
    }
    e.forward();
    if (well_conditioned(e)) break;
  }
  e.dy = random.tensor(e.y.size(), 1, 0, true);
  e.backward();
  double expected = inner(e.dx, e.x), size = std::fabs(expected);
  for (int i = 0; i < 4; ++i) {
    expected += inner(e.dw[i], e.w[i]);
    size += std::fabs(inner(e.dw[i], e.w[i]));
  }
  if (std::fabs(inner(e.dy, e.y) - expected) > 1e-10 * (1 + size)) {
    ++failures;
    std::printf("FAIL the plain loops disagree with themselves\n     %s\n", describe(s).c_str());
  }
  return well_conditioned(e);
}

}  // namespace

int main(int argc, char** argv) {
  const conv_block::Table& table = conv_block::FASTMETA_ISA::table;
  const int shapes = argc > 1 ? std::atoi(argv[1]) : 200;
  Random random(argc > 2 ? std::atoi(argv[2]) : 1);
  double worst64 = 0, worst32 = 0;
  int checked = 0, refused = 0, close = 0;
  while (checked < shapes) {
    const Shape s = random.shape();
    const Wanted wanted = random.wanted();
    Plain<Dual> expected(s);
    if (expected.h < 1 || expected.w_ < 1 || expected.ph < 1 || expected.pw < 1) continue;
    if (!table.supported(s)) {
      ++refused;
      continue;
    }
    // Of few values the variance may be near zero, and everything then grows without bound.
    if (s.norm == Norm::batch && s.n * expected.h * expected.w_ < 8) continue;
    const bool clear = draw(random, wanted, expected);
    Check<double> exact(table.f64, s, expected, wanted, 1e-11);
    exact.run();
    worst64 = std::max(worst64, exact.worst);
    if (clear) {
      Check<float> single(table.f32, s, expected, wanted, 2e-4);
      single.run();
      worst32 = std::max(worst32, single.worst);
    } else {
      ++close;
    }
    ++checked;
  }
  std::printf("%d shapes (%d refused, %d not in float32), worst float64 %.2g, worst float32 %.2g, %d failures\n",
              checked, refused, close, worst64, worst32, failures);
  return failures == 0 ? 0 : 1;
}
