// A resumable operation as a coroutine: it suspends on a condition, the engine polls the condition and
// resumes it.
#pragma once
#include <coroutine>
#include <exception>
#include <utility>

namespace paceline {

class Task {
 public:
  struct promise_type {
    bool (*is_ready)(void*) = nullptr;  // nullptr: ready
    void* condition = nullptr;
    std::exception_ptr error;

    Task get_return_object() { return Task(std::coroutine_handle<promise_type>::from_promise(*this)); }
    std::suspend_always initial_suspend() noexcept { return {}; }
    std::suspend_always final_suspend() noexcept { return {}; }
    void return_void() {}
    void unhandled_exception() { error = std::current_exception(); }
  };

  Task() = default;
  explicit Task(std::coroutine_handle<promise_type> handle) : handle_(handle) {}
  Task(Task&& other) noexcept : handle_(std::exchange(other.handle_, {})) {}
  Task& operator=(Task&& other) noexcept {
    reset();
    handle_ = std::exchange(other.handle_, {});
    return *this;
  }
  ~Task() { reset(); }

  void reset() {
    if (handle_) std::exchange(handle_, {}).destroy();
  }
  bool is_done() const { return handle_.done(); }

  // Resumes once if what it waits for has come; true if it moved.
  bool step() {
    promise_type& promise = handle_.promise();
    if (promise.is_ready && !promise.is_ready(promise.condition)) return false;
    handle_.resume();
    if (promise.error) std::rethrow_exception(std::exchange(promise.error, nullptr));
    return true;
  }

 private:
  std::coroutine_handle<promise_type> handle_;
};

// `co_await Until(f)` continues once f() returns true.
template <class F>
struct Until {
  F f;
  explicit Until(F f) : f(std::move(f)) {}
  bool await_ready() { return f(); }
  void await_suspend(std::coroutine_handle<Task::promise_type> handle) {
    handle.promise().is_ready = [](void* self) { return static_cast<Until*>(self)->f(); };
    handle.promise().condition = this;
  }
  void await_resume() const noexcept {}
};

// `co_await Pause()` lets the engine look at other operations first.
struct Pause {
  bool await_ready() const noexcept { return false; }
  void await_suspend(std::coroutine_handle<Task::promise_type> handle) {
    handle.promise().is_ready = nullptr;
  }
  void await_resume() const noexcept {}
};

}  // namespace paceline
