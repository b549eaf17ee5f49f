// Runs CUDA kernels on the CPU: a .cu file that includes common/cuda_launch.cuh compiles with a C++ compiler
// and -DPEFTCORE_EMULATOR, with this header in CUDA's place.
//
// Every thread of a block is a fiber. A fiber runs until it waits: at a barrier, in a warp collective, or at
// its end. Which one runs next, and the order of blocks, are drawn from a seed, with some warps far ahead of
// others, so threads that need a barrier and have none meet each other's data too early or too late under
// some seed. Before each block, shared memory is filled with 0xff (NaN, -1): nothing is inherited from the
// block before.
//
// What it finds: wrong arithmetic and indexing, missing barriers (over seeds), barriers that not all threads
// reach, collectives whose mask names lanes that do not come, reads before a cp.async was waited for, reads of a
// block of the cluster that has ended or not begun; and
// under AddressSanitizer and UndefinedBehaviorSanitizer, accesses out of range and misaligned vectors. What
// it cannot find: anything about speed, memory ordering between blocks, and races within one stretch between
// two waits.
//
// A launch returns nullptr or what went wrong. One launch at a time: the emulator has one state.
#pragma once

#include "emulator_clusters.h"
#include "emulator_collectives.h"
#include "emulator_language.h"
#include "emulator_launch.h"
