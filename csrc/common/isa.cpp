#include "isa.h"

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

namespace fastmeta {
namespace {

constexpr Isa every[] = {Isa::plain, Isa::v3, Isa::v4};
constexpr int undecided = -1;
std::atomic<int> in_use{undecided};

Isa find(const char* name) {
  for (Isa isa : every)
    if (std::strcmp(name, isa_name(isa)) == 0) return isa;
  throw std::runtime_error(std::string("FASTMETA_ISA: instruction set must be one of plain, v3, v4, got '") + name + "'");
}

Isa checked(Isa isa) {
  const std::string name = isa_name(isa);
  if (!isa_compiled(isa))
    throw std::runtime_error("FASTMETA_ISA: instruction set '" + name + "' is not in this build of fastmeta");
  if (!isa_supported(isa))
    throw std::runtime_error("FASTMETA_ISA: this processor does not run instruction set '" + name + "'");
  return isa;
}

Isa decide() {
  if (const char* asked = std::getenv("FASTMETA_ISA"); asked != nullptr && *asked != '\0') return checked(find(asked));
  Isa best = Isa::plain;
  for (Isa isa : every)
    if (isa_compiled(isa) && isa_supported(isa)) best = isa;
  return best;
}

}  // namespace

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::v3: return "v3";
    case Isa::v4: return "v4";
    default: return "plain";
  }
}

bool isa_compiled(Isa isa) {
#define FASTMETA_CASE(name) \
  if (isa == Isa::name) return true;
  FASTMETA_FOR_EACH_ISA(FASTMETA_CASE)
#undef FASTMETA_CASE
  return false;
}

bool isa_supported(Isa isa) {
  if (isa == Isa::plain) return true;
#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
  __builtin_cpu_init();
  const bool v3 = __builtin_cpu_supports("popcnt") && __builtin_cpu_supports("avx2") &&
                  __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2");
  const bool v4 = v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                  __builtin_cpu_supports("avx512vl");
  switch (isa) {
    case Isa::v3: return v3;
    case Isa::v4: return v4;
    default: return true;
  }
#else
  return false;
#endif
}

Isa isa_in_use() {
  int isa = in_use.load(std::memory_order_relaxed);
  if (isa == undecided) {
    isa = static_cast<int>(decide());
    in_use.store(isa, std::memory_order_relaxed);
  }
  return static_cast<Isa>(isa);
}

void use_isa(const char* name) {
  in_use.store(*name == '\0' ? undecided : static_cast<int>(checked(find(name))), std::memory_order_relaxed);
}

}  // namespace fastmeta
