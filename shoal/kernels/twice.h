/* Includes the file SELF for float and for double: see vectors.h. */
#define T float
#define INDEX int32_t
#define NAME(x) x##_f32
#include SELF
#undef T
#undef INDEX
#undef NAME
#define T double
#define INDEX int64_t
#define NAME(x) x##_f64
#include SELF
