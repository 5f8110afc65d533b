// Hints to bring a cache line nearer; nothing where the compiler has none. Any address is allowed.
#pragma once

#if defined(__GNUC__) || defined(__clang__)
#define FASTMETA_PREFETCH_READ(address) __builtin_prefetch(address, 0, 2)
#define FASTMETA_PREFETCH_WRITE(address) __builtin_prefetch(address, 1, 2)
#else
#define FASTMETA_PREFETCH_READ(address) static_cast<void>(address)
#define FASTMETA_PREFETCH_WRITE(address) static_cast<void>(address)
#endif
