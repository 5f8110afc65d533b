// The part of DLPack's C functions for exchange (version 1.3, https://dmlc.github.io/dlpack/latest/c_api.html) that
// reads a tensor: its layout in memory is a standard, so no header of PyTorch's is needed.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fastmeta::dlpack {

struct Device {
  std::int32_t type, id;

  bool operator==(const Device& other) const { return type == other.type && id == other.id; }
};

struct DataType {
  std::uint8_t code, bits;
  std::uint16_t lanes;

  bool operator==(const DataType& other) const {
    return code == other.code && bits == other.bits && lanes == other.lanes;
  }
};

struct Tensor {
  void* data;
  Device device;
  std::int32_t dimensions;
  DataType dtype;
  std::int64_t *shape, *strides;  // strides in elements
  std::uint64_t byte_offset;
};

constexpr std::uint32_t major_version = 1;
constexpr char capsule[] = "dlpack_exchange_api", attribute[] = "__dlpack_c_exchange_api__";

// What a type's capsule holds.
struct Exchange {
  std::uint32_t major, minor;
  const void* older;
  void (*owning[3])();  // allocate, export and import with ownership: not ours
  int (*read)(void* object, Tensor* out);  // without ownership; not 0 where it raised; may be null
};

static_assert(sizeof(Tensor) == 48 && offsetof(Exchange, read) == 40, "the layout of a 64-bit machine");

}  // namespace fastmeta::dlpack
