/* What the kernels have in common, each of which is written once for all types of numbers: `#define SELF` to the file's own name, include
 * this at its beginning, and `twice.h` once what does not depend on the type is defined. There the file is included for float and for
 * double, and this once more: T is the type then, INDEX a whole number of its size, and NAME(x) the name of x for it.
 *
 * V and I are vectors of either, LANES numbers each. The portable vector types of GCC and clang become AVX-512, AVX2, NEON or plain code.
 */
#ifndef T
#include <stdint.h>

/* Of registers: their size, and so many rows of PANEL vectors that the sums of a matrix product take most of them. */
#if defined(__AVX512F__)
enum { VECTOR_BYTES = 64, PANEL = 4 };
#else
enum { VECTOR_BYTES = 32, PANEL = 2 };
#endif
#define INLINE static inline __attribute__((always_inline))
#else

typedef T NAME(V) __attribute__((vector_size(VECTOR_BYTES), aligned(sizeof(T))));
typedef INDEX NAME(I) __attribute__((vector_size(VECTOR_BYTES)));
#define V NAME(V)
#define I NAME(I)
#define LANES ((int64_t)(VECTOR_BYTES / sizeof(T)))
#endif
