// The least of a test framework: named cases, CHECK, ranks as threads.
#pragma once
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <map>
#include <string>
#include <thread>
#include <vector>

#define CHECK(condition)                                                           \
  do {                                                                             \
    if (!(condition)) {                                                            \
      std::fprintf(stderr, "%s:%d: failed: %s\n", __FILE__, __LINE__, #condition); \
      std::_Exit(1);                                                               \
    }                                                                              \
  } while (false)

inline std::map<std::string, std::function<void()>>& cases() {
  static std::map<std::string, std::function<void()>> all;
  return all;
}
struct Case {
  Case(const char* name, std::function<void()> body) { cases()[name] = std::move(body); }
};
#define CASE(name)                            \
  static void name();                         \
  static const Case name##_case(#name, name); \
  static void name()

template <class F>
void run_ranks(int num_ranks, F body) {
  std::vector<std::thread> threads;
  for (int r = 0; r < num_ranks; ++r) threads.emplace_back([&body, r] { body(r); });
  for (auto& t : threads) t.join();
}

// Runs the cases named on the command line, or all.
inline int run_cases(int argc, char** argv) {
  for (const auto& [name, body] : cases()) {
    bool is_wanted = argc == 1;
    for (int i = 1; i < argc; ++i) is_wanted |= name == argv[i];
    if (!is_wanted) continue;
    std::fprintf(stderr, "%s\n", name.c_str());
    body();
  }
  return 0;
}
