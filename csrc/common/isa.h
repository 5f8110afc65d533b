// Instruction sets: which ones this build holds, which ones this processor runs, which one the kernels use.
//
// Files named cpu.cpp are compiled once for each instruction set, with FASTMETA_ISA naming it, and put everything they
// define into a namespace of that name. They include no header with inline functions of its own (<vector>,
// <algorithm>): the linker keeps one copy of such a function, and that copy could hold instructions an older processor
// lacks.
#pragma once

namespace fastmeta {

// x86-64-v3 has AVX2 and FMA, v4 AVX-512 (F, BW, CD, DQ, VL). `plain` is the compiler's own default.
enum class Isa : int { plain, v3, v4 };

#if defined(FASTMETA_HAVE_V3)
#define FASTMETA_IF_V3(X) X(v3)
#else
#define FASTMETA_IF_V3(X)
#endif
#if defined(FASTMETA_HAVE_V4)
#define FASTMETA_IF_V4(X) X(v4)
#else
#define FASTMETA_IF_V4(X)
#endif

// X(name) for every instruction set of this build, the least first.
#define FASTMETA_FOR_EACH_ISA(X) X(plain) FASTMETA_IF_V3(X) FASTMETA_IF_V4(X)

// In an operation's namespace, after its struct Table: every instruction set's table, and table_of(isa).
#define FASTMETA_TABLES                                                                        \
  FASTMETA_FOR_EACH_ISA(FASTMETA_DECLARE_TABLE)                                                \
  static inline const Table& table_of(Isa isa) {                                               \
    switch (isa) { FASTMETA_FOR_EACH_ISA(FASTMETA_TABLE_CASE) default: return plain::table; } \
  }
#define FASTMETA_DECLARE_TABLE(isa) \
  namespace isa {                   \
  extern const Table table;         \
  }
#define FASTMETA_TABLE_CASE(isa) \
  case Isa::isa: return isa::table;

const char* isa_name(Isa isa);
bool isa_compiled(Isa isa);
bool isa_supported(Isa isa);  // by the processor and the operating system

// The one in use: what use_isa set, else what the environment variable FASTMETA_ISA asks for, else the best.
Isa isa_in_use();

// Use `name` from now on; "" goes back to the choice above. Throws std::runtime_error where it cannot run.
void use_isa(const char* name);

}  // namespace fastmeta
