// The meta-gradient of a batch of tasks: each task's inner loop, query set and adjoint in one go, tasks over threads or
// threads within tasks.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

#include "../common/shelf.h"
#include "packed.h"
#include "plan.h"

namespace fastmeta::executor {

// What one call is asked. Pointers are null where their result is not wanted.
template <class R>
struct Request {
  std::int64_t tasks, steps;
  bool first_order;
  const R* alpha;  // [steps or 1, 1 or adapted parameters]
  bool rate_per_step, rate_per_parameter;
  std::vector<const R*> parameters;  // in the program's order
  std::vector<Leaf> support, query;
  bool gradient;              // whether one is wanted
  const R* d_losses;          // [tasks]: cotangents of the query losses; null for those of their mean
  std::vector<R*> gradients;  // of the differentiated parameters
  R* d_alpha;                 // like alpha
  R* loss;                    // [1]: the mean query loss
  R* losses;                  // [tasks]
  R* support_losses;          // [steps, tasks]
  R* outputs;                 // [tasks, output_rows, output_columns]
  std::int64_t output_rows, output_columns;
  int threads;
  Profile* profile;  // is added to
  // Where it is not empty, done by the caller while other threads have begun; `gradients` may be as late as that.
  std::function<void()> own = {};
};

// What a workspace's layout depends on.
struct Kind {
  std::int64_t steps;
  bool second_order, learned, rate_per_parameter;  // learned: gradients to alpha are wanted

  bool operator==(const Kind& other) const {
    return steps == other.steps && second_order == other.second_order && learned == other.learned &&
           rate_per_parameter == other.rate_per_parameter;
  }
};

// How the threads are shared out.
struct Sharing {
  int at_once, within;  // tasks, and threads that work on each
  bool in_turn;         // whether tasks run one after another on however many threads
};

template <class R>
class MetaGradient {
 public:
  MetaGradient(Program support, Program query, Isa isa);
  ~MetaGradient();

  Isa isa() const { return isa_; }
  void run(const Request<R>& request);
  const Plan<R>& support() const { return support_; }
  std::unique_ptr<Profile> profile() const;  // an empty one
  Sharing sharing(std::int64_t tasks, const Kind& kind, int threads) const;
  // Bytes that each of the tasks at work holds, and those that are held beside them, but for the results.
  std::int64_t workspace_bytes(const Kind& kind, int within) const;
  std::int64_t common_bytes(std::int64_t tasks, const Kind& kind) const;

 private:
  struct Layout;
  struct Workspace;
  struct Watches;
  struct Blocks;

  Layout layout(const Kind& kind, int within) const;
  Blocks blocks(std::int64_t tasks, const Kind& kind) const;
  std::int64_t theta_elements(const Kind& kind) const;
  void check(const Request<R>& request) const;
  void write_rates(const Request<R>& request, R* rates) const;
  void bind(Workspace& workspace, const Kind& kind, int within, const R* theta) const;
  // Leaves the task's gradients in the workspace.
  void run_task(const Request<R>& request, std::int64_t task, Workspace& workspace, double& loss,
                Watches* watches) const;
  void adjoint(const Request<R>& request, std::int64_t task, Workspace& workspace, Stopwatch* watch) const;
  bool runs_once(const Workspace& workspace) const;  // whether the adjoint has a sweep over what runs once

  const Isa isa_;
  const packed::Kernels<R>& kernels_;
  const Program support_program_, query_program_;
  const Plan<R> support_, query_;
  const bool collects_;  // some weight is formed for no task
  const std::unique_ptr<Shelf<Memory<R>>> thetas_;      // shared weights, packed, and the rates behind them
  const std::unique_ptr<Shelf<Workspace>> workspaces_;  // one a task at work
};

}  // namespace fastmeta::executor
