// Counters by which the blocks of a launch agree without another launch: which block is the last one and adds the
// partial sums of the others, and which work is taken. They are zero before and after each kernel.
#pragma once

namespace peftcore {

constexpr int kMostTickets = 512;

}  // namespace peftcore

// `count` counters of the current device for a launch on `stream`, a cudaStream_t, that no other launch uses at the
// same time: launches on a stream run one after another and share counters; a launch captured into a graph, which may
// run concurrently with any other, keeps its counters forever. (Two executables of one graph share them, as they share
// the memory of every tensor in it: they must not run at the same time.) nullptr where none are left, or for more than
// kMostTickets: the caller then does without.
extern "C" unsigned* peftcore_tickets(int count, void* stream);
