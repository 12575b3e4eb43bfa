// Includes the file named by QUANTLIB_SELF once per instruction set, each time in a namespace of its own and
// compiled for that set, so that one source serves them all and the object file runs on any CPU. The file keeps
// what it defines per instruction set under `#ifdef QUANTLIB_ISA` and dispatches with QUANTLIB_DISPATCH.
// Code in there must not instantiate templates of namespace std: the linker may keep that copy for everybody.
#include "cpu.h"

#if (defined(__x86_64__) || defined(_M_X64)) && defined(__GNUC__)
#define QUANTLIB_X86 1
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif
#if defined(__GNUC__) && !defined(__clang__)
// False alarms inside the intrinsics' own header (GCC bug 105593), and a note on 32-byte arguments that no call
// here passes: all are inlined.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wpsabi"
#endif

#define QUANTLIB_ISA portable
#define QUANTLIB_LEVEL 0
#include QUANTLIB_SELF
#undef QUANTLIB_ISA
#undef QUANTLIB_LEVEL

#ifdef QUANTLIB_X86
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif
#define QUANTLIB_ISA avx2
#define QUANTLIB_LEVEL 1
#include QUANTLIB_SELF
#undef QUANTLIB_ISA
#undef QUANTLIB_LEVEL
#ifdef __clang__
#pragma clang attribute pop
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni"))), \
                             apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")
#endif
#define QUANTLIB_ISA avx512
#define QUANTLIB_LEVEL 2
#include QUANTLIB_SELF
#undef QUANTLIB_ISA
#undef QUANTLIB_LEVEL
#ifdef __clang__
#pragma clang attribute pop
#pragma clang attribute push(                                                                                     \
    __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16,avx512vbmi"))), \
    apply_to = function)
#else
#pragma GCC target("avx512bf16,avx512vbmi")
#endif
#define QUANTLIB_ISA avx512bf16
#define QUANTLIB_LEVEL 3
#include QUANTLIB_SELF
#undef QUANTLIB_ISA
#undef QUANTLIB_LEVEL
#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#define QUANTLIB_DISPATCH(function)                \
  (isa() >= Isa::avx512bf16 ? avx512bf16::function \
   : isa() == Isa::avx512   ? avx512::function     \
   : isa() == Isa::avx2     ? avx2::function       \
                            : portable::function)
#else
#define QUANTLIB_DISPATCH(function) portable::function
#endif
