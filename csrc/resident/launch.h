// What the host asks of a device; cuda.cu. CUDA's errors are thrown as std::runtime_error.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "plan.h"
#include "tensors.h"

namespace fastmeta::resident {

// How many devices there are; the reason where there is none.
int devices(std::string& reason);

// Bytes of shared memory that one block may have.
int shared_limit(int device);

// The plan that fits the device; std::invalid_argument with the bytes where none does.
template <class R>
Plan fitting_plan(const Network& net, const Kind& kind, int limit);

// Lets a plan's blocks have all the shared memory that the device offers. Once, outside of any capture.
template <class R>
void prepare(const Plan& plan, int device);

// Two launches on the stream; nothing waits.
template <class R>
void launch(const Plan& plan, const Tensors<R>& io, int device, std::uintptr_t stream);

}  // namespace fastmeta::resident
