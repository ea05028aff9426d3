//! IGQ-ViT: instance-aware group quantization (Moon et al., CVPR 2024, arXiv 2404.00928).
//!
//! An operand has a few static uniform grids; at run time every channel of every image, and every row
//! of attention scores, is assigned to the grid whose bounds are nearest to its own minimum and
//! maximum. No learning. Specification: methods/igq-vit.md. The authors released no code: what the
//! paper leaves open is listed in docs/methods.md.

mod allocation;
mod clusters;
mod memory;
mod quantizer;
mod sensitivity;

use tch::{Device, Kind, Tensor};

use crate::calib::kept::{Tensors, restore_or_compute};
use crate::calib::report::{Seen, SiteLog, require_finite};
use crate::calib::{CalibrationTask, Quantization};
use crate::error::{Error, Result};
use crate::exec::{Float, Tap, TapSink};
use crate::methods::{Method, MethodEntry, MethodOptions, OptionKind, OptionSpec};
use crate::model::Model;
use crate::nn::{Operand, Role, Site, SiteId};
use crate::quant::quantizer::boxed;
use crate::quant::search::uniform_grid;
use crate::quant::uniform::{Range, Uniform};
use crate::quant::{BitWidth, QuantPlan};
use crate::tensor::{quantile_range, to_vec_f64};

use allocation::{Decision, allocate};
use clusters::{Extent, cluster};
use quantizer::{Bounds, GridRules, Grouped, Layout, OwnRange, Part};
use sensitivity::FloatForward;

/// Group counts that the allocation chooses from.
const CANDIDATES: [i64; 7] = [4, 6, 8, 10, 12, 14, 16];

/// Share of q, k, v, pixels and the classifier's input that is clipped at each end.
const ACTIVATION_EPSILON: f64 = 1e-4;

/// The registry line.
pub(super) const METHOD: MethodEntry = MethodEntry {
    id: "igq",
    summary: "static groups of uniform grids; channels and score rows of each image choose theirs",
    source: "IGQ-ViT, CVPR 2024, arXiv 2404.00928",
    options: OPTIONS,
    build: || Box::new(Igq),
    restore: |state| match state.kind.as_str() {
        quantizer::GROUPED_KIND => boxed(Grouped::restore(state)),
        quantizer::OWN_RANGE_KIND => boxed(OwnRange::restore(state)),
        _ => None,
    },
};

const OPTIONS: &[OptionSpec] = &[
    OptionSpec {
        name: "groups",
        help: "grids of a linear input (with allocation: their mean, weighted by cost)",
        kind: OptionKind::Int { min: 1, max: 64 },
        default: "8",
    },
    OptionSpec {
        name: "row_groups",
        help: "grids of attention scores (with allocation: what counts in the budget)",
        kind: OptionKind::Int { min: 1, max: 64 },
        default: "8",
    },
    OptionSpec {
        name: "allocation",
        help: "share the groups out among the layers by their effect on predictions",
        kind: OptionKind::Bool,
        default: "true",
    },
    OptionSpec {
        name: "assignment",
        help: "static groups, or a grid of its own for every channel and row (the upper bound)",
        kind: OptionKind::Choice(&["groups", "upper_bound"]),
        default: "groups",
    },
    OptionSpec {
        name: "bounds",
        help: "a grid spans all of its members' ranges, or their mean",
        kind: OptionKind::Choice(&["max", "mean"]),
        default: "max",
    },
    OptionSpec {
        name: "qkv",
        help: "q, k and v: one static grid each, or groups of head channels",
        kind: OptionKind::Choice(&["per_tensor", "group"]),
        default: "per_tensor",
    },
    OptionSpec {
        name: "weight_epsilon",
        help: "share of a weight channel's values clipped at each end",
        kind: OptionKind::Float { min: 0.0, max: 0.49 },
        default: "0.0001",
    },
];

#[derive(Debug)]
struct Igq;

impl Method for Igq {
    fn calibrate(&self, task: &mut CalibrationTask<'_>) -> Result<Quantization> {
        let settings = Settings::read(&task.options)?;
        let model = task.model()?;
        let units = model.units.len();
        let images = task.images.shallow_clone();
        let mut observer =
            Observer { task, settings, units, plan: QuantPlan::default(), operands: Vec::new() };
        let counts = if settings.allocation {
            let float = FloatForward::run(&model, &images, &mut observer)?;
            let search = Search { task, settings, model: &model, float: &float };
            search.counts(&observer.operands)?
        } else {
            let _logits = model.forward(&mut Tap::new(&mut Float, &mut observer), &images)?;
            observer.operands.iter().map(|operand| operand.groups).collect()
        };
        let Observer { mut plan, operands, .. } = observer;
        for (operand, count) in operands.iter().zip(counts) {
            let quantizer = operand.grouped(count, settings, task.device)?;
            plan.insert(operand.site, operand.operand, Box::new(quantizer));
        }
        let mut recorder = Recorder { log: SiteLog::new(task, "calibrate", units), plan: &plan };
        let _logits = model.forward(&mut Tap::new(&mut Float, &mut recorder), &images)?;
        let report = recorder.log.finish();
        Ok(Quantization { plan, report, ..Quantization::default() })
    }
}

/// What parts of operands are assigned to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Assignment {
    /// Static groups.
    Groups,
    /// A grid of each part's own.
    UpperBound,
}

/// The options, resolved.
#[derive(Clone, Copy, Debug)]
struct Settings {
    groups: i64,
    row_groups: i64,
    allocation: bool,
    assignment: Assignment,
    bounds: Bounds,
    /// Whether q, k and v are grouped.
    grouped_qkv: bool,
    weight_epsilon: f64,
}

impl Settings {
    fn read(options: &MethodOptions) -> Result<Self> {
        let is = |name: &str, value: &str| Ok::<_, Error>(options.choice(name)? == value);
        let assignment = if is("assignment", "upper_bound")? {
            Assignment::UpperBound
        } else {
            Assignment::Groups
        };
        let settings = Self {
            groups: options.int("groups")?,
            row_groups: options.int("row_groups")?,
            allocation: options.bool("allocation")? && assignment == Assignment::Groups,
            assignment,
            bounds: if is("bounds", "max")? { Bounds::Max } else { Bounds::Mean },
            grouped_qkv: is("qkv", "group")?,
            weight_epsilon: options.float("weight_epsilon")?,
        };
        for (name, count) in [("groups", settings.groups), ("row_groups", settings.row_groups)] {
            let (least, most) = (CANDIDATES[0], CANDIDATES[CANDIDATES.len() - 1]);
            if settings.allocation && !(least..=most).contains(&count) {
                let reason = format!("the allocation needs {least} to {most} groups, not {count}");
                return Err(Error::invalid(format!("options.{name}"), reason));
            }
        }
        Ok(settings)
    }

    /// What of an operand is assigned as one; `None` for operands with one grid (section 5).
    fn part(self, role: Role, operand: Operand) -> Option<Part> {
        match (role, operand) {
            (Role::Embed | Role::Head, _) => None,
            (Role::ScoreValue, Operand::Lhs) => Some(Part::ScoreRows),
            (Role::QueryKey, _) => self.grouped_qkv.then_some(Part::HeadChannels),
            (Role::ScoreValue, Operand::Rhs) => self.grouped_qkv.then_some(Part::ValueChannels),
            (Role::Qkv | Role::Proj | Role::Fc1 | Role::Fc2 | Role::Reduction, _) => {
                Some(Part::Channels)
            }
        }
    }
}

/// An operand that gets groups.
#[derive(Debug)]
struct GroupedOperand {
    site: SiteId,
    operand: Operand,
    unit: usize,
    bits: BitWidth,
    layout: Layout,
    /// Its parts' extents, of all calibration images.
    extents: Vec<Extent>,
    /// Groups without allocation.
    groups: i64,
    /// 32-bit operations per image that one more group costs.
    cost: f64,
}

impl GroupedOperand {
    /// The quantizer with that many groups.
    fn grouped(&self, count: i64, settings: Settings, device: Device) -> Result<Grouped> {
        let clusters = cluster(&self.extents, usize::try_from(count).unwrap_or(1));
        let rules = GridRules { bits: self.bits, bounds: settings.bounds, device };
        Grouped::new(self.layout, &clusters, rules)
    }
}

/// Makes every quantizer that needs no groups, and notes the extents of the operands that do.
struct Observer<'t, 'p> {
    task: &'t CalibrationTask<'p>,
    settings: Settings,
    units: usize,
    plan: QuantPlan,
    operands: Vec<GroupedOperand>,
}

impl TapSink for Observer<'_, '_> {
    fn operand(&mut self, site: &Site, operand: Operand, x: &Tensor) -> Result<()> {
        self.task.step("observe", site.unit + 1, self.units)?;
        require_finite(site, operand, x)?;
        if operand == Operand::Rhs && !site.role.is_matmul() {
            let Some(bits) = self.task.weight_bits(site.role) else { return Ok(()) };
            // Per output channel, clipped at the ε-quantiles (methods/ubb.md, section 3).
            let (low, high) = quantile_range(x, 1.0 - self.settings.weight_epsilon)?;
            let quantizer = uniform_grid(&Range { low, high }, bits)?;
            self.plan.insert(site.id, operand, Box::new(quantizer));
            return Ok(());
        }
        let Some(bits) = self.task.activation_bits(site.role) else { return Ok(()) };
        let Some(part) = self.settings.part(site.role, operand) else {
            // Pixels are 8-bit data: fewer bits would quantize the image, not the model.
            let bits = if site.role == Role::Embed { BitWidth::EIGHT } else { bits };
            self.plan.insert(site.id, operand, Box::new(per_tensor(x, bits)?));
            return Ok(());
        };
        let layout = Layout { part, windows: site.windows };
        if self.settings.assignment == Assignment::UpperBound {
            self.plan.insert(site.id, operand, Box::new(OwnRange { bits, layout }));
            return Ok(());
        }
        let extents = layout.extents(x)?;
        let Settings { groups, row_groups, .. } = self.settings;
        let cost = extents.len() as f64 / self.task.image_count() as f64;
        self.operands.push(GroupedOperand {
            site: site.id,
            operand,
            unit: site.unit,
            bits,
            layout,
            extents,
            groups: if part == Part::ScoreRows { row_groups } else { groups },
            cost,
        });
        Ok(())
    }

    fn output(&mut self, site: &Site, y: &Tensor) -> Result<()> {
        let images = self.task.image_count() as f64;
        for operand in self.operands.iter_mut().rev().take_while(|o| o.site == site.id) {
            // Groups along the summed axis are summed one by one.
            if matches!(operand.layout.part, Part::Channels | Part::HeadChannels) {
                operand.cost += y.numel() as f64 / images;
            }
        }
        Ok(())
    }
}

/// One grid for the whole tensor, clipped at the ε-quantiles; parameters of shape `[1]`.
fn per_tensor(x: &Tensor, bits: BitWidth) -> Result<Uniform> {
    let (low, high) = quantile_range(&x.f_reshape([1, -1])?, 1.0 - ACTIVATION_EPSILON)?;
    uniform_grid(&Range { low: low.f_view([1])?, high: high.f_view([1])? }, bits)
}

/// The search for group counts.
struct Search<'a, 't> {
    task: &'a CalibrationTask<'t>,
    settings: Settings,
    model: &'a Model,
    float: &'a FloatForward,
}

impl Search<'_, '_> {
    /// The group counts of least total sensitivity within the budget of the fixed counts.
    fn counts(&self, operands: &[GroupedOperand]) -> Result<Vec<i64>> {
        let mut decisions = Vec::with_capacity(operands.len());
        for (index, operand) in operands.iter().enumerate() {
            let fits = |kept: &Tensors| {
                kept.iter().all(|(_, losses)| losses.kind() == Kind::Double)
                    && kept.iter().map(|(_, losses)| losses.numel()).eq([CANDIDATES.len()])
            };
            let kept =
                restore_or_compute(self.task, &format!("allocate.{index:03}"), fits, || {
                    let mut losses = Vec::with_capacity(CANDIDATES.len());
                    for count in CANDIDATES {
                        self.task.step("allocate", index + 1, operands.len())?;
                        let mut plan = QuantPlan::default();
                        let quantizer = operand.grouped(count, self.settings, self.task.device)?;
                        plan.insert(operand.site, operand.operand, Box::new(quantizer));
                        losses.push(self.float.divergence(self.model, operand.unit, &plan)?);
                    }
                    Ok(vec![("losses".to_owned(), Tensor::f_from_slice(&losses)?)])
                })?;
            let mut losses = Vec::new();
            for (_, kept) in &kept {
                losses.extend(to_vec_f64(kept)?);
            }
            decisions.push(Decision { cost: operand.cost, fixed: operand.groups, losses });
        }
        let chosen = allocate(&decisions, &CANDIDATES);
        Ok(chosen.into_iter().map(|index| CANDIDATES[index]).collect())
    }
}

/// Notes the error of every quantized operand of the float forward.
struct Recorder<'a, 't, 'p> {
    log: SiteLog<'t, 'p>,
    plan: &'a QuantPlan,
}

impl TapSink for Recorder<'_, '_, '_> {
    fn operand(&mut self, site: &Site, operand: Operand, x: &Tensor) -> Result<()> {
        let Some(quantizer) = self.plan.get(site.id, operand) else { return Ok(()) };
        let x_hat = quantizer.fake_quantize(x)?;
        self.log.record(&Seen { site, operand, quantizer, x, x_hat: &x_hat })
    }
}

#[cfg(test)]
mod tests;
