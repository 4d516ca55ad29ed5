// The unit test's only tool: a check that says where it failed and with what, and goes on.
#pragma once

#include <cstdio>
#include <cstdlib>

inline int failures = 0;

#define EXPECT(condition, ...)                                                  \
  do {                                                                          \
    if (!(condition)) {                                                         \
      if (++failures <= 20) {                                                   \
        std::fprintf(stderr, "%s:%d: %s: ", __FILE__, __LINE__, #condition);    \
        std::fprintf(stderr, __VA_ARGS__);                                      \
        std::fprintf(stderr, "\n");                                             \
      }                                                                         \
    }                                                                           \
  } while (0)
