// What this machine can do, measured: the limits that kernels are held against.
#pragma once

namespace qwire {

// Each runs on all threads of the pool for about `seconds`.
double measure_read_bandwidth(double seconds);  // bytes a second, from memory that no cache holds
double measure_fma(double seconds);             // float32 operations a second, a multiply-add counting as two
double measure_int8(double seconds);            // the same for products of 8-bit integers summed into 32 bits

}  // namespace qwire
