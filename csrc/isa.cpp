#include "isa.h"

#include <ATen/native/CPUBlas.h>

#include <cstdlib>
#include <cstring>

#if defined(__x86_64__) && defined(__GNUC__)
#include <cpuid.h>
#endif

namespace sgcd {
namespace {

enum Level { kPortable, kAvx2, kAvx512, kAvx512Bf16, kAmx };
constexpr const char* kNames[] = {"portable", "avx2", "avx512", "avx512_bf16", "amx"};

Level processor_level() {
#if defined(__x86_64__) && defined(__GNUC__)
  __builtin_cpu_init();  // also checks the operating system: registers that it does not save are unusable
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return kPortable;
  if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
      !__builtin_cpu_supports("avx512dq") || !__builtin_cpu_supports("avx512vl"))
    return kAvx2;
  unsigned a = 0, b = 0, c = 0, d = 0;
  const bool bf16 = __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 5 & 1);
  if (!bf16) return kAvx512;
  const bool amx = __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d >> 22 & 1) && (d >> 24 & 1);
  return amx ? kAmx : kAvx512Bf16;
#else
  return kPortable;
#endif
}

// SGCD_CPU_ISA lowers the instruction set, for benchmarks and tests; it cannot raise it.
Level chosen_level() {
  const Level has = processor_level();
  const char* cap = std::getenv("SGCD_CPU_ISA");
  if (!cap) return has;
  for (int level = kPortable; level <= has; level++)
    if (!std::strcmp(cap, kNames[level])) return static_cast<Level>(level);
  return has;
}

Isa find_isa() {
  Level level = chosen_level();
  // The library may be configured or built without tile units.
  if (level == kAmx && !at::native::cpublas::could_pack(at::kBFloat16)) level = kAvx512Bf16;
  // Another compiler may have built none of these paths.
  if (level >= kAvx512 && tile_kernels_avx512())
    return {kNames[level], tile_kernels_avx512(), level == kAmx, float_product_avx512(),
            level == kAvx512Bf16 ? bf16_product_avx512() : nullptr};
  if (level == kAvx2 && tile_kernels_avx2())
    return {kNames[level], tile_kernels_avx2(), false, float_product_avx2(), nullptr};
  if (level == kAmx) return {kNames[level], tile_kernels_portable(), true, nullptr, nullptr};
  return {kNames[kPortable], tile_kernels_portable(), false, nullptr, nullptr};
}

}  // namespace

const Isa& cpu_isa() {
  static const Isa isa = find_isa();
  return isa;
}

}  // namespace sgcd
